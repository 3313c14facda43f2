"""Quantized models that are broken, lie, or are quantized otherwise than is read: refused in a sentence."""

from __future__ import annotations

import builtins
import json
import struct
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support import quantized
from support.command_line import sparsify as run
from support.quantized import Tensors, change_config, dense_folder, tensors_of

import sparsify
from sparsify.errors import CheckpointError
from sparsify.files.ledger import write_manifest
from sparsify.frontend.source import open_source

Q_PROJ = "model.layers.0.self_attn.q_proj"


def opened(folder: Path) -> None:
    """Everything that is read of it."""
    weights = open_source(folder).weights
    for name in weights.parameters():
        weights.read(name)


def refused(folder: Path, *words: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        opened(folder)
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))
    return str(caught.value)


def changed(folder: Path, change: Callable[[Tensors], Any]) -> Path:
    tensors = tensors_of(folder)
    change(tensors)
    quantized.store(folder, tensors)
    return folder


MAKE: dict[str, Callable[[Path], Path]] = {
    "fp8": quantized.block_fp8,
    "modelopt": quantized.modelopt_fp8,
    "mxfp4": quantized.mxfp4,
    "gptq": quantized.gptq,
    "awq": quantized.awq,
    "nf4": quantized.bitsandbytes,
    "int8": partial(quantized.bitsandbytes, kind="int8"),
    "int4": partial(
        quantized.compressed, form="pack-quantized", num_bits=4, type="int", strategy="group", group_size=16,
        symmetric=False,
    ),
    "float8": partial(quantized.compressed, form="float-quantized", num_bits=8, type="float", strategy="channel"),
}  # fmt: skip
_PACKAGES = {
    "nf4": "bitsandbytes",
    "int8": "bitsandbytes",
    "int4": "compressed_tensors",
    "float8": "compressed_tensors",
}
# What each weight is read with.
PARTS = {
    "fp8": ["weight_scale_inv"],
    "modelopt": ["weight_scale"],
    "mxfp4": ["_scales"],
    "gptq": ["scales", "qzeros"],
    "awq": ["scales", "qzeros"],
    "nf4": ["absmax", "quant_map", "nested_absmax", "nested_quant_map", "bitsandbytes__nf4"],
    "int8": ["SCB"],
    "int4": ["weight_scale", "weight_zero_point", "weight_shape"],
    "float8": ["weight_scale"],
}
CASES = [(kind, part) for kind, parts in PARTS.items() for part in parts]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    kind, part = request.param
    if kind in _PACKAGES:
        pytest.importorskip(_PACKAGES[kind], reason=f"{_PACKAGES[kind]} is not installed (the extra quantized)")
    return part, MAKE[kind](tmp_path / "model")


def first(tensors: Tensors, part: str) -> str:
    return min(name for name in tensors if name.endswith(part))


def test_a_part_that_is_missing(case: tuple[str, Path]) -> None:
    part, folder = case
    gone = []
    changed(folder, lambda tensors: gone.append(tensors.pop(first(tensors, part)) is not None))
    refused(folder)


def test_a_part_of_another_shape(case: tuple[str, Path]) -> None:
    part, folder = case

    def longer(tensors: Tensors) -> None:
        name = first(tensors, part)
        tensors[name] = torch.stack([tensors[name]] * 3).reshape(3, -1) if part != "weight_scale" else torch.ones(7, 5)

    changed(folder, longer)
    refused(folder)


def test_a_part_of_another_dtype(case: tuple[str, Path]) -> None:
    part, folder = case

    def other(tensors: Tensors) -> None:
        name = first(tensors, part)
        tensors[name] = tensors[name].to(torch.float64)

    changed(folder, other)
    refused(folder)


@pytest.mark.parametrize(
    ("kind", "value"), [("fp8", torch.nan), ("modelopt", torch.inf), ("gptq", torch.inf), ("awq", torch.nan)]
)
def test_a_scale_that_is_not_finite(kind: str, value: float, tmp_path: Path) -> None:
    folder = MAKE[kind](tmp_path / "model")

    def spoil(tensors: Tensors) -> None:
        name = first(tensors, PARTS[kind][0])
        tensors[name] = torch.full_like(tensors[name], value)

    changed(folder, spoil)
    refused(folder, "NaN or infinity in it", "model.layers.0.mlp.down_proj.weight")
    if kind != "fp8":
        return
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        sparsify.compile(folder, ["magnitude:50%"], only=["*q_proj*"], output=folder.parent / "out")
    assert not (folder.parent / "out").exists()
    sparsify.compile(folder, ["magnitude:50%"], only=["*q_proj*"], output=folder.parent / "out", allow_nan=True)


def test_an_exponent_that_no_dtype_holds(tmp_path: Path) -> None:
    folder = quantized.mxfp4(tmp_path / "model")
    changed(folder, lambda tensors: tensors[first(tensors, "_scales")].fill_(255))
    refused(folder, "NaN or infinity")


def test_float8_that_nothing_explains(tmp_path: Path) -> None:
    folder = quantized.modelopt_fp8(tmp_path / "model", said=False)
    changed(folder, lambda tensors: [tensors.pop(n) for n in list(tensors) if n.endswith("_scale")])
    refused(folder, "a quantized checkpoint", "float8_e4m3fn", "neither config.json nor a file beside it")
    # The file says that it is quantized, and the scales are not there.
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    refused(folder, "weight_scale", "is not there")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_whole_numbers_that_nothing_explains(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = quantized.dense_folder(tmp_path / "model")
    changed(folder, lambda t: t.update({f"{Q_PROJ}.weight": torch.ones(32, 32, dtype=dtype)}))
    refused(folder, "a quantized checkpoint", str(dtype), Q_PROJ)


NOT_READ: dict[str, tuple[str, dict[str, Any], str]] = {
    "a method that there is not": ("gptq", {"quant_method": "magic"}, "'magic'"),
    "no method": ("gptq", {"bits": 4}, "'None'"),
    "a method that is none": ("gptq", {"quant_method": ["gptq"]}, "gptq"),
    "three bits": ("gptq", {"quant_method": "gptq", "bits": 3, "group_size": 16}, "bits 3"),
    "bits as a text": ("gptq", {"quant_method": "gptq", "bits": "4", "group_size": 16}, "bits '4'"),
    "a group of nothing": ("gptq", {"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size 0"),
    "another group": ("gptq", {"quant_method": "gptq", "bits": 4, "group_size": 32}, "belongs"),
    "marlin": ("gptq", {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "marlin"),
    "gemv": ("awq", {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemv"}, "gemv"),
    "blocks of text": ("fp8", {"quant_method": "fp8", "weight_block_size": "128"}, "weight_block_size"),
    "blocks of nothing": ("fp8", {"quant_method": "fp8", "weight_block_size": [0, 1]}, "weight_block_size"),
    "other blocks": ("fp8", {"quant_method": "fp8", "weight_block_size": [8, 8]}, "belongs"),
    "nvfp4": ("modelopt", {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4"),
    "another's": ("fp8", {"quant_method": "gptq", "bits": 4, "group_size": 16}, "does not explain"),
    "groups of nothing": ("float8", {"quant_method": "compressed-tensors", "config_groups": {}}, "names no groups"),
    "groups of nonsense": ("float8", {"quant_method": "compressed-tensors", "config_groups": {"a": 3}}, "its config"),
    "a format of nonsense": (
        "float8",
        {"quant_method": "compressed-tensors", "format": "x", "config_groups": {"a": {"targets": ["Linear"]}}},
        "'x'",
    ),
}


@pytest.mark.parametrize("kind", NOT_READ)
def test_what_is_not_read_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    make, config, word = NOT_READ[kind]
    if make in _PACKAGES:
        pytest.importorskip(_PACKAGES[make], reason=f"{_PACKAGES[make]} is not installed (the extra quantized)")
    folder = MAKE[make](tmp_path / "model")
    change_config(folder, quantization_config=config)
    (folder / "hf_quant_config.json").unlink(missing_ok=True)
    refused(folder, word)


@pytest.mark.parametrize("package", ["gguf", "bitsandbytes", "compressed_tensors"])
def test_a_library_that_is_missing_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed (the extra quantized)")
    makers = {
        "gguf": lambda f: quantized.gguf(f / "m.gguf"),
        "bitsandbytes": MAKE["nf4"],
        "compressed_tensors": MAKE["int4"],
    }
    model = makers[package](tmp_path / "model")
    found = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ImportError(f"No module named {name!r}")
        return found(name, *rest)

    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(builtins, "__import__", without)
    refused(model, package.replace("_", "-"), 'pip install "sparsify-fx[quantized]"')


def test_the_index_of_groups_stays_in_bounds(tmp_path: Path) -> None:
    folder = quantized.gptq(tmp_path / "model")
    changed(folder, lambda tensors: tensors[first(tensors, "g_idx")].fill_(99))
    refused(folder, "g_idx names groups 99 to 99 of")


def test_what_a_state_says_is_held_against_the_tensors(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (the extra quantized)")
    for number, change in enumerate(
        [
            {"shape": [1 << 40, 1 << 20]}, {"shape": [-4, -16]}, {"shape": None}, {"shape": "no"}, {"blocksize": 0},
            {"blocksize": 1 << 60}, {"dtype": "load"}, {"quant_type": "fp4"}, {"nested_offset": "x"},
            {"nested_dtype": "save"}, {"nested_blocksize": 0},
        ]
    ):  # fmt: skip
        folder = quantized.bitsandbytes(tmp_path / str(number))

        def say(tensors: Tensors, change: dict[str, Any] = change) -> None:
            name = first(tensors, "bitsandbytes__nf4")
            facts = json.loads(bytes(tensors[name].tolist())) | change
            tensors[name] = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)

        changed(folder, say)
        refused(folder)


def test_bytes_are_held_against_the_manifest(tmp_path: Path) -> None:
    """A quantized folder with a sparsify.json: each part is what it was, or the weight is not read."""
    folder = quantized.gptq(tmp_path / "model")
    from sparsify.files.checkpoint import Checkpoint

    write_manifest(folder, {"model": "x"}, Checkpoint(folder).digests())
    opened(folder)
    changed(folder, lambda tensors: tensors[f"{Q_PROJ}.scales"].add_(1))
    refused(folder, f"{Q_PROJ}.scales", "not those that were written")


class TestGguf:
    """A file of which any byte may be any."""

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        pytest.importorskip("gguf", reason="gguf is not installed (the extra quantized)")
        return quantized.gguf(tmp_path / "tiny.gguf", tokens=False)

    @pytest.mark.parametrize("kept", [0, 3, 20, 30, 400, 1500, -1, -5000])
    def test_truncated(self, kept: int, file: Path) -> None:
        file.write_bytes(file.read_bytes()[:kept])
        refused(file, "truncated")

    @pytest.mark.parametrize("place", [8, 16])
    @pytest.mark.parametrize("count", [1 << 62, 1 << 32, (1 << 64) - 1])
    def test_counts_without_end(self, place: int, count: int, file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[place : place + 8] = struct.pack("<Q", count)
        file.write_bytes(data)
        refused(file, "not a sound GGUF file")

    def test_layers_without_end(self, file: Path) -> None:
        key = b"llama.block_count"
        data = bytearray(file.read_bytes())
        place = data.index(key) + len(key) + 4
        data[place : place + 4] = struct.pack("<I", 1_000_000_000)
        file.write_bytes(data)
        refused(file)

    def test_a_number_that_is_not_finite(self, file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[-200:] = b"\xff" * 200
        file.write_bytes(data)
        refused(file, "NaN or infinity")

    def test_no_gguf_at_all(self, tmp_path: Path) -> None:
        file = tmp_path / "x.gguf"
        file.write_bytes(b"GGUF" + b"\xff" * 100)
        refused(file, "not a sound GGUF file")
        assert run("compile", file, "--pass", "magnitude:50%", cwd=tmp_path).returncode == 1
        file.write_bytes(b"\x80\x02" * 50)
        refused(file, "does not begin with GGUF")

    def test_an_architecture_that_transformers_does_not_read(self, file: Path) -> None:
        data = file.read_bytes().replace(b"llama", b"lamas")
        file.write_bytes(data)
        refused(file, "transformers does not read 'lamas'")

    @pytest.mark.slow
    def test_any_byte(self, file: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        data, header = file.read_bytes(), 1400
        for _ in range(15):
            place = int(torch.randint(4, header, (), generator=generator))
            spoiled = bytearray(data)
            spoiled[place] = int(torch.randint(0, 256, (), generator=generator))
            file.write_bytes(spoiled)
            try:
                opened(file)
            except CheckpointError:
                continue


def test_a_quantization_that_says_nothing_is_none(tmp_path: Path) -> None:
    folder = dense_folder(tmp_path / "model")
    change_config(folder, quantization_config={})
    sparsify.compile(folder, ["magnitude:2:4"], output=tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("kind", ["fp8", "modelopt"])
def test_scales_of_no_quantized_weight_are_left_out(kind: str, tmp_path: Path) -> None:
    """Of a weight that is dense, and of one that is not there."""
    folder, end = MAKE[kind](tmp_path / "model"), PARTS[kind][0]

    def change(tensors: Tensors) -> None:
        tensors[f"{Q_PROJ}.weight"] = tensors[f"{Q_PROJ}.weight"].to(torch.bfloat16)
        tensors[f"model.layers.9.self_attn.q_proj.{end}"] = torch.ones(1)

    changed(folder, change)
    with pytest.warns(RuntimeWarning, match=rf"{Q_PROJ}.{end}, .*layers.9.*of no quantized weight"):
        result = sparsify.compile(folder, ["magnitude:2:4"], output=tmp_path / "out")
    assert result.output is not None
    written = tensors_of(result.output)
    assert f"{Q_PROJ}.weight" in written and not [name for name in written if "scale" in name]


def test_a_damaged_gptq_weight_is_named(tmp_path: Path) -> None:
    folder = quantized.gptq(tmp_path / "model", 4, None, True)
    changed(folder, lambda tensors: tensors[f"{Q_PROJ}.g_idx"].fill_(1000))
    refused(folder, f"dequantizing {Q_PROJ}.weight", "g_idx names groups 1000")
