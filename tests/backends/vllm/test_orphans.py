"""Checkpoints of compressed-tensors that vLLM has not read since 2026, served through the plug-in as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.quantized import without_zeros
from support.serving_vllm import generated, half, model, tokens_of, two_of_four

from sparsify.backends.vllm.orphans import Orphan, Orphans, form_of
from sparsify.errors import CheckpointError
from sparsify.runtime.layout import Packed, unpack


def config(form: str, **more: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "format": "dense", "sparsity_config": {"format": form, **more}}


@pytest.mark.parametrize("form", ["sparse-24-bitmask", "sparse-bitmask"])
def test_tokens_are_those_of_the_dense_checkpoint(form: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed: make vllm")
    pairs = form == "sparse-24-bitmask"
    made = model("tied", {"v_proj": lambda w: w, "proj": two_of_four if pairs else half})
    made.save_pretrained(tmp_path / "dense")
    tensors = {}
    for name, parameter in made.named_parameters():
        base, weight = name.removesuffix(".weight"), parameter.detach()
        if "proj" in name and "v_proj" not in name:
            tensors |= {f"{base}.{part}": tensor for part, tensor in without_zeros(weight, pairs=pairs).items()}
        else:
            tensors[name] = weight
    folder = tmp_path / "orphan"
    made.config.save_pretrained(folder)
    own = json.loads((tmp_path / "dense" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(own | {"quantization_config": config(form, targets=["Linear"])}))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    want, engine = generated(tmp_path / "dense"), request.getfixturevalue("engine")
    llm = engine(folder)
    assert tokens_of(llm) == want
    # Held as it is stored: half the numbers, and which they are.
    layer = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model.model.layers[0].mlp.down_proj
    held = sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()))
    assert held <= 0.6 * 4 * 128 * 320


def test_which_configs_are_claimed() -> None:
    assert form_of(config("sparse-24-bitmask")) == "sparse-24-bitmask"
    assert form_of(config("dense")) == "dense"
    assert form_of(config("sparse-24-bitmask") | {"config_groups": {}}) == "sparse-24-bitmask"
    # Quantized besides: `sparsify compile` reads those.
    assert form_of(config("sparse-24-bitmask") | {"config_groups": {"group_0": {}}}) is None
    assert form_of(config("marlin-24")) is None
    assert form_of({"quant_method": "compressed-tensors", "config_groups": {"group_0": {}}}) is None
    assert form_of({"quant_method": "sparsify", "sparsity_config": {"format": "dense"}}) is None


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


def test_a_weight_comes_in_any_order_or_dense() -> None:
    weight = two_of_four(torch.randn(8, 64))
    parts = without_zeros(weight, pairs=True)
    for order in (list(parts), list(reversed(parts))):
        orphan = Orphan("a.proj", "sparse-24-bitmask")
        came = [orphan.add(name, parts[name]) for name in order]
        assert came[:-1] == [None, None]
        assert isinstance(came[-1], Packed) and torch.equal(unpack(came[-1]), weight)
    assert Orphan("a.proj", "sparse-24-bitmask").add("weight", weight) is weight


@pytest.mark.parametrize("part", ["bitmask", "shape"])
def test_damage_is_refused_by_name(part: str) -> None:
    parts = without_zeros(two_of_four(torch.randn(8, 64)), pairs=True)
    # A place more or less, or a row less.
    parts[part] = parts[part].clone()
    parts[part].view(-1)[0] ^= 1
    orphan = Orphan("a.proj", "sparse-24-bitmask")
    orphan.add("compressed", parts["compressed"])
    orphan.add("bitmask", parts["bitmask"])
    with pytest.raises(CheckpointError, match=r"weight a\.proj\.weight"):
        orphan.add("shape", parts["shape"])
    orphan.parts.clear()
    orphan.add("compressed", parts["compressed"])
    assert orphan.missing == ["a.proj.bitmask", "a.proj.shape"]
