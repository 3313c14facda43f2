"""Checkpoints of compressed-tensors that vLLM has not read since 2026, served through the plug-in as they are."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import marlin
from support.quantized import change_config, store, tensors_of, without_zeros
from support.serving_vllm import Pruned, dense, generated, half, model, tokens_of, two_of_four
from torch import Tensor

from sparsify.backends.vllm.orphans import Orphan, Orphans, form_of, is_left_over
from sparsify.errors import CheckpointError
from sparsify.files.ledger import Ledger
from sparsify.quantized.recognise import open_checkpoint
from sparsify.runtime.layout import Packed, unpack

Parts = dict[str, Tensor]
Write = Callable[[Tensor], Parts]
# Of these the config says that their zeros lie there: an expression, and a name.
DOWN, UP = "re:.*down_proj", "model.layers.1.mlp.up_proj"


def config(form: str, **more: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "format": "dense", "sparsity_config": {"format": form, **more}}


def groups(form: str, **weights: Any) -> dict[str, Any]:
    given = {"symmetric": True, "dynamic": False, "strategy": "channel", "num_bits": 8, "type": "int"} | weights
    # Rounded inputs, which the kernels of that time took, are asked for too, and are not made.
    inputs = {"num_bits": 8, "type": given["type"], "strategy": "token", "dynamic": True, "symmetric": True}
    group = {"targets": ["Linear"], "weights": given, "input_activations": inputs}
    return {"format": form, "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


def scaled(kind: torch.dtype, most: float, pairs: bool) -> Write:
    def write(weight: Tensor) -> Parts:
        scale = (weight.abs().amax(1, keepdim=True) / most).clamp(min=1e-6)
        values = weight / scale
        values = values.round().to(kind) if kind == torch.int8 else values.to(kind)
        return without_zeros(values, pairs=pairs) | {"weight_scale": scale, "input_scale": torch.ones(1)}

    return write


def beside_a_zero(weight: Tensor) -> Parts:
    """Whole numbers that begin at another than zero, which is the same for all: then zeros are no zeros as stored."""
    parts = scaled(torch.int8, 63, True)(weight)
    return parts | {"weight_zero_point": torch.zeros_like(parts["weight_scale"], dtype=torch.int8)}


def as_marlin(weight: Tensor) -> Parts:
    return marlin.written(weight, 4, 64)[0]


MOST: dict[str, tuple[str, dict[str, Pruned], Write, dict[str, Any]]] = {
    "2:4": (
        "tied",
        {"v_proj": dense, "proj": two_of_four},
        lambda w: without_zeros(w, pairs=True),
        config("sparse-24-bitmask", targets=["Linear"]),
    ),
    "other zeros": (
        "tied",
        {"v_proj": dense, "proj": half},
        lambda w: without_zeros(w, pairs=False),
        config("sparse-bitmask", targets=["Linear"]),
    ),
    "2:4 of int8": (
        "tied",
        {"proj": two_of_four},
        scaled(torch.int8, 127, True),
        config("sparse-24-bitmask", targets=["Linear"]) | groups("int-quantized"),
    ),
    "int8, some with their zeros": (
        "tied",
        {"proj": two_of_four},
        scaled(torch.int8, 127, True),
        config("sparse-24-bitmask", targets=["Linear"], ignore=[DOWN, UP]) | groups("int-quantized"),
    ),
    "int8 with zero points": (
        "tied",
        {"proj": two_of_four},
        beside_a_zero,
        config("sparse-24-bitmask", targets=["Linear"], ignore=[DOWN, UP]) | groups("int-quantized", symmetric=False),
    ),
    "other zeros of fp8": (
        "tied",
        {"proj": half},
        scaled(torch.float8_e4m3fn, 448, False),
        config("sparse-bitmask", targets=["Linear"]) | groups("float-quantized", type="float"),
    ),
    "marlin-24": (
        "tied",
        {"proj": two_of_four},
        as_marlin,
        {"quant_method": "compressed-tensors"} | groups("marlin-24", num_bits=4, strategy="group", group_size=64),
    ),
    "experts": (
        "qwen3_moe",
        {"experts": two_of_four, "proj": two_of_four},
        lambda w: without_zeros(w, pairs=True),
        config("sparse-24-bitmask", targets=["Linear"]),
    ),
    "experts of int8": (
        "mixtral",
        {"experts": two_of_four, "proj": two_of_four},
        scaled(torch.int8, 127, True),
        config("sparse-24-bitmask", targets=["Linear"]) | groups("int-quantized"),
    ),
}


def with_zeros(parts: Parts) -> Parts:
    """The values of 2:4 in their places, and what lies beside them."""
    rows, columns = parts["shape"].flatten().tolist()
    bits = parts["bitmask"].unsqueeze(-1) >> torch.arange(8) & 1
    full = torch.zeros(rows, columns, dtype=parts["compressed"].dtype)
    full[bits.flatten(1)[:, :columns] == 1] = parts["compressed"].flatten()
    return {"weight": full} | {name: tensor for name, tensor in parts.items() if name.startswith(("weight_", "input_"))}


def is_linear(name: str) -> bool:
    return name.endswith(("proj.weight", ".w1.weight", ".w2.weight", ".w3.weight"))


def orphan(case: str, folder: Path) -> tuple[Path, Path]:
    """A checkpoint of MOST, and the same with its weights dense as the importer reads them."""
    family, pruned, write, said = MOST[case]
    made = model(family, pruned)
    made.save_pretrained(folder / "dense")
    made.save_pretrained(folder / "orphan")
    tensors: Parts = {}
    for name, weight in tensors_of(folder / "dense").items():
        if is_linear(name) and pruned.get(name.split(".")[-2]) is not dense:
            parts = write(weight.float())
            ignored = said.get("sparsity_config", {}).get("ignore", [])
            if (DOWN in ignored and "down_proj" in name) or (UP in ignored and name == f"{UP}.weight"):
                parts = with_zeros(parts)
            tensors |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
        else:
            tensors[name] = weight
    store(folder / "orphan", tensors)
    change_config(folder / "orphan", quantization_config=said)
    read = open_checkpoint(folder / "orphan", Ledger.of(folder / "orphan"), torch.float32)
    store(folder / "dense", {name: read.read(name) for name in read.names()})
    return folder / "orphan", folder / "dense"


@pytest.mark.parametrize("case", MOST)
def test_tokens_are_those_of_the_dense_checkpoint(case: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed: make vllm")
    folder, same = orphan(case, tmp_path)
    want, engine = generated(same), request.getfixturevalue("engine")
    llm = engine(folder)
    assert tokens_of(llm) == want
    layer = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model.model.layers[0]
    if "experts" in case:
        packed = next(m for m in layer.modules() if hasattr(m, "sparsify_products") and hasattr(m, "w2_weight"))
        held, full = sum(t.nbytes for n, t in packed.named_parameters()), 4 * 4 * 3 * 128 * 128
    else:
        packed = layer.mlp.down_proj
        held, full = sum(t.nbytes for t in (*packed.parameters(), *packed.buffers())), 4 * 128 * 320
    # Half the numbers, and which they are.
    assert 0 < held <= 0.6 * full


def _without_a_mask(folder: Path) -> None:
    store(folder, {name: t for name, t in tensors_of(folder).items() if name != f"{UP}.bitmask"})


def _without_a_scale(folder: Path) -> None:
    store(folder, {name: t for name, t in tensors_of(folder).items() if name != f"{UP}.weight_scale"})


def _without_any(folder: Path) -> None:
    store(folder, {name: t for name, t in tensors_of(folder).items() if not name.startswith(f"{UP}.")})


def _cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _of_another_model(folder: Path) -> None:
    tensors = tensors_of(folder)
    other = {f"{UP}.{part}": tensors[f"{UP.replace('mlp.up', 'self_attn.q')}.{part}"] for part in _WHOLE}
    store(folder, tensors | other)


_WHOLE = ("compressed", "bitmask", "shape", "weight_scale")
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "a tensor too few": (_without_a_mask, rf"packed tensor {UP}\.bitmask: the checkpoint does not hold it"),
    "a scale too few": (_without_a_scale, rf"packed tensor {UP}\.weight_scale: the checkpoint does not hold it"),
    "a weight too few": (_without_any, rf"packed tensor {UP}\.compressed: the checkpoint does not hold it"),
    "bytes cut off": (_cut_off, r"model\.safetensors: not a sound safetensors file"),
    "a weight of another model": (_of_another_model, rf"{UP}\.weight: \[128, 128\] where the model has \[320, 128\]"),
}


def test_broken_ones_are_refused_by_name(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed: make vllm")
    sound, engine = orphan("2:4 of int8", tmp_path)[0], request.getfixturevalue("engine")
    for name, (broken, told) in BROKEN.items():
        folder = shutil.copytree(sound, tmp_path / name)
        broken(folder)
        with pytest.raises(CheckpointError, match=told):
            engine(folder)
        cleanup()


def test_an_expert_too_few(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed: make vllm")
    folder, _ = orphan("experts", tmp_path)
    lost = "model.layers.1.mlp.experts.2.down_proj"
    store(folder, {name: t for name, t in tensors_of(folder).items() if name != f"{lost}.bitmask"})
    with pytest.raises(CheckpointError, match=rf"packed tensor {lost}\.bitmask: the checkpoint does not hold it"):
        request.getfixturevalue("engine")(folder)


def cleanup() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


def test_which_configs_are_claimed() -> None:
    assert form_of(config("sparse-24-bitmask")) == "sparse-24-bitmask"
    assert form_of(config("dense")) == "dense"
    assert form_of(config("sparse-24-bitmask") | {"config_groups": {}}) == "sparse-24-bitmask"
    assert form_of(config("sparse-bitmask") | groups("int-quantized")) == "sparse-bitmask"
    assert form_of({"quant_method": "compressed-tensors"} | groups("marlin-24")) == "marlin-24"
    # What vLLM reads itself.
    assert form_of({"quant_method": "compressed-tensors", "config_groups": {"group_0": {}}}) is None
    assert form_of(config("dense") | groups("int-quantized")) is None
    assert form_of({"quant_method": "sparsify", "sparsity_config": {"format": "dense"}}) is None


def test_an_entry_that_says_nothing_is_taken_out() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed: make vllm")
    from sparsify.backends.vllm.config import SparsifyConfig

    left = config("dense", targets=["Linear"]) | groups("int-quantized")
    assert is_left_over(left) and not is_left_over(config("dense"))
    assert SparsifyConfig.override_quantization_method(left, None) is None
    assert "sparsity_config" not in left and left["config_groups"]


def test_ignored_modules() -> None:
    found = Orphans.of(config("sparse-bitmask", ignore=["lm_head", "re:.*gate$"]))
    assert found is not None
    assert [found.ignored(name) for name in ("lm_head", "model.lm_head", "a.mlp.gate", "a.gate_proj")] == [
        True,
        False,
        True,
        False,
    ]
    leftover = Orphans.of(config("dense"))
    assert leftover is not None and leftover.ignored("anything")


def test_ignored_by_the_one_and_not_by_the_other() -> None:
    said = config("sparse-24-bitmask", ignore=["a.up_proj", "lm_head"]) | groups("int-quantized")
    found = Orphans.of(said | {"ignore": ["a.down_proj", "lm_head"]})
    assert found is not None
    assert [found.ignored(name) for name in ("lm_head", "a.up_proj", "a.down_proj")] == [True, False, False]
    assert [found.quantized(name) for name in ("lm_head", "a.up_proj", "a.down_proj")] == [False, True, False]


def test_a_weight_comes_in_any_order_or_dense() -> None:
    weight = two_of_four(torch.randn(8, 64))
    parts = without_zeros(weight, pairs=True)
    for order in (list(parts), list(reversed(parts))):
        one = Orphan("a.proj", "sparse-24-bitmask")
        came = [one.add(name, parts[name]) for name in order]
        assert came[:-1] == [None, None]
        assert isinstance(came[-1], Packed) and torch.equal(unpack(came[-1]), weight)
    assert Orphan("a.proj", "sparse-24-bitmask").add("weight", weight) is weight


@pytest.mark.parametrize("part", ["bitmask", "shape"])
def test_damage_is_refused_by_name(part: str) -> None:
    parts = without_zeros(two_of_four(torch.randn(8, 64)), pairs=True)
    # A place more or less, or a row less.
    parts[part] = parts[part].clone()
    parts[part].view(-1)[0] ^= 1
    one = Orphan("a.proj", "sparse-24-bitmask")
    one.add("compressed", parts["compressed"])
    one.add("bitmask", parts["bitmask"])
    with pytest.raises(CheckpointError, match=r"weight a\.proj\.weight"):
        one.add("shape", parts["shape"])
    one.parts.clear()
    one.add("compressed", parts["compressed"])
    assert one.missing == ["a.proj.bitmask", "a.proj.shape"]


def quantized(form: str, **weights: Any) -> Orphan:
    found = Orphans.of(config("sparse-24-bitmask") | groups(form, **weights))
    assert found is not None
    return found.orphan("a.proj")


def test_quantized_values_wait_for_their_scales() -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed (the extra quantized)")
    weight = two_of_four(torch.randn(8, 64))
    parts = scaled(torch.int8, 127, True)(weight)
    one = quantized("int-quantized")
    assert one.add("weight_zero_point", torch.zeros(8, 1, dtype=torch.int8)) is None
    for name in ("compressed", "bitmask", "shape"):
        assert one.add(name, parts[name]) is None
    assert one.missing == ["a.proj.weight_scale"]
    matrix = one.add("weight_scale", parts["weight_scale"])
    assert isinstance(matrix, Packed) and torch.allclose(unpack(matrix), weight, atol=0.02)
    # With its zeros it is dense or packed by what it is.
    one = quantized("int-quantized")
    assert one.add("weight", (weight / parts["weight_scale"]).round().to(torch.int8)) is None
    again = one.add("weight_scale", parts["weight_scale"])
    assert isinstance(again, Packed) and torch.equal(unpack(again), unpack(matrix))


def test_what_is_quantized_otherwise_is_refused_by_name() -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed (the extra quantized)")
    parts = scaled(torch.int8, 127, True)(two_of_four(torch.randn(8, 64)))
    one = quantized("nvfp4-pack-quantized")
    for name in ("compressed", "bitmask", "shape"):
        one.add(name, parts[name])
    with pytest.raises(CheckpointError, match=r"a\.proj.*'nvfp4-pack-quantized' of compressed-tensors, of which"):
        one.add("weight_scale", parts["weight_scale"])
    # Whole numbers in a checkpoint that says of none that they are.
    bare = Orphan("a.proj", "sparse-24-bitmask")
    bare.add("compressed", parts["compressed"])
    bare.add("bitmask", parts["bitmask"])
    with pytest.raises(CheckpointError, match=r"weight a\.proj\.weight.*stored in torch\.int8"):
        bare.add("shape", parts["shape"])
