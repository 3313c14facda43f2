"""2:4 weights of few bits in the order of the kernel Marlin-24, against a writer that places one number at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support import marlin
from support.quantized import Tensors, change_config, store, tensors_of
from torch import Tensor

import sparsify
from sparsify.errors import CheckpointError
from sparsify.frontend.source import open_source

MODEL = Path(__file__).parents[2] / "models" / "pycode-6m"
KEY = "model.layers.0.self_attn.k_proj"


@cache
def written(bits: int, group: int | None) -> tuple[Tensors, Tensor]:
    """The parts of the bundled model's matrix, and what it is then."""
    return marlin.written(tensors_of(MODEL)[f"{KEY}.weight"], bits, group)


def model(folder: Path, bits: int, group: int | None, **config: Any) -> tuple[Path, Tensor]:
    """The bundled model with one matrix in this format, and that matrix."""
    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("sparsify.json", "README.md"))
    tensors = tensors_of(folder)
    del tensors[f"{KEY}.weight"]
    parts, want = written(bits, group)
    tensors |= {f"{KEY}.{key}": part for key, part in parts.items()}
    store(folder, tensors)
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group" if group else "channel"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    said = {"quant_method": "compressed-tensors", "format": "marlin-24", "config_groups": groups} | config
    change_config(folder, quantization_config=said)
    return folder, want


@pytest.mark.parametrize("group", [128, 64, None])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_number_comes_back(bits: int, group: int | None, tmp_path: Path) -> None:
    folder, want = model(tmp_path / "model", bits, group)
    source = open_source(folder, dtype="float32")
    assert torch.equal(source.weights.read(f"{KEY}.weight"), want)
    assert source.quantization is not None and source.quantization["method"] == "marlin-24 of compressed-tensors"


def test_it_is_written_out_without_a_pass(tmp_path: Path) -> None:
    folder, want = model(tmp_path / "model", 4, 128)
    sparsify.compile(folder, [], output=tmp_path / "out", dtype="float16")
    assert torch.equal(tensors_of(tmp_path / "out")[f"{KEY}.weight"], want.half())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


DAMAGED: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "places": (lambda t: t[f"{KEY}.meta"][0, :1].fill_(0x0004), "no two of four"),
    "no places": (lambda t: t.pop(f"{KEY}.meta"), "meta, which it is read with, is not there"),
    "no scale": (lambda t: t.pop(f"{KEY}.scale_packed"), "scale_packed, which it is read with, is not there"),
    "no values": (lambda t: t.pop(f"{KEY}.weight_packed"), "weight_packed, which it is read with, is not there"),
    "half of them": (lambda t: t.update({f"{KEY}.weight_packed": t[f"{KEY}.weight_packed"][:, ::2]}), "none of 4 bits"),
    "other places": (lambda t: t.update({f"{KEY}.meta": t[f"{KEY}.meta"][:1]}), "meta is"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damage_is_named(kind: str, tmp_path: Path) -> None:
    change, word = DAMAGED[kind]
    folder, _ = model(tmp_path / "model", 4, 128)
    tensors = tensors_of(folder)
    change(tensors)
    store(folder, tensors)
    with pytest.raises(CheckpointError, match=word):
        sparsify.compile(folder, [], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bits_that_there_are_not(tmp_path: Path) -> None:
    folder, _ = model(tmp_path / "model", 4, 128)
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 3}}}
    said = {"quant_method": "compressed-tensors", "format": "marlin-24", "config_groups": groups}
    change_config(folder, quantization_config=said)
    with pytest.raises(CheckpointError, match=r"marlin-24 of .*3.* bits, of which 4 and 8 are read"):
        open_source(folder)
