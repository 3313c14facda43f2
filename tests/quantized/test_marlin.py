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
from support.quantized import Tensors, change_config, pruned_24, store, tensors_of
from torch import Tensor

import sparsify
from sparsify.errors import CheckpointError
from sparsify.frontend.source import open_source

MODEL = Path(__file__).parents[2] / "models" / "pycode-6m"
KEY = "model.layers.0.self_attn.k_proj"


def integers(weight: Tensor, bits: int, group: int | None) -> tuple[Tensor, Tensor]:
    """The kept of ``weight`` as whole numbers, and a scale for each group of each row."""
    rows, columns = weight.shape
    parts = pruned_24(weight.float()).view(rows, -1, group or columns)
    scale = (parts.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)).half().clamp(min=2.0**-24)
    whole = (parts / scale.float()).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return whole.view(rows, columns), scale[..., 0]


def places_of_a_warp(bits: int) -> list[tuple[int, int]]:
    """(row, column) in 16 rows of inputs and 64 of outputs of the numbers in 32 lanes' words, as they follow."""
    found: list[tuple[int, int]] = []
    turn = [0, 2, 4, 6, 1, 3, 5, 7] if bits == 4 else [0, 2, 1, 3]
    for lane in range(32):
        for step in range(4):
            for block in range(2):
                for row in (0, 1, 8, 9):
                    at = 16 * (2 * (lane % 4) + row) + lane // 8 * 256 + 8 * (lane // 4 % 2) + 4 * block + step
                    tile, inside = divmod(at, 256)
                    found.append((inside // 16, tile * 16 + inside % 16))
    return [found[first + turn[m]] for first in range(0, len(found), len(turn)) for m in range(len(turn))]


@cache
def written(bits: int, group: int | None) -> tuple[Tensors, Tensor]:
    """The parts of the bundled model's matrix, and what it is then."""
    weight = tensors_of(MODEL)[f"{KEY}.weight"]
    whole, scale = integers(weight, bits, group)
    rows, columns = weight.shape
    numbers = whole.int().tolist()
    kept = [[0] * (columns // 2) for _ in range(rows)]
    codes = [[0] * (columns // 16) for _ in range(rows)]
    for n in range(rows):
        for g in range(columns // 4):
            own = [c for c in range(4) if numbers[n][4 * g + c]]
            own = sorted(own + [c for c in range(3, -1, -1) if c not in own][: 2 - len(own)])
            kept[n][2 * g], kept[n][2 * g + 1] = (numbers[n][4 * g + c] for c in own)
            codes[n][g // 4] |= (own[0] | own[1] << 2) << 4 * (g % 4)
    each, order = 32 // bits, places_of_a_warp(bits)
    packed = torch.zeros(columns // 32, rows * 16 // each, dtype=torch.int64)
    for tile in range(columns // 32):
        for chunk in range(rows // 64):
            for place, (row, column) in enumerate(order):
                at = chunk * len(order) + place
                number = kept[chunk * 64 + column][tile * 16 + row] + 2 ** (bits - 1)
                packed[tile, at // each] |= number << bits * (at % each)
    meta = torch.zeros(rows * columns // 16, dtype=torch.int64)
    for n in range(rows):
        for w in range(columns // 16):
            r = n // 64 * 64 + n % 2 * 2 + n % 8 // 4 + n % 4 // 2 * 32 + n % 64 // 8 * 4
            r, c = (r + 1, w - 1) if r % 2 == 0 and w % 2 else (r - 1, w + 1) if r % 2 and w % 2 == 0 else (r, w)
            meta[c // 2 * rows * 2 + r * 2 + c % 2] = codes[n][w]
    lanes = scale.t().contiguous()
    if group is not None and group < columns // 2:
        lanes = lanes.view(-1, 8)[:, [0, 4, 1, 5, 2, 6, 3, 7]].view(lanes.shape).contiguous()
    parts = {
        "weight_packed": packed.where(packed < 2**31, packed - 2**32).to(torch.int32),
        "meta": meta.where(meta < 2**15, meta - 2**16).to(torch.int16).view(columns // 32, rows * 2),
        "scale_packed": lanes,
    }
    return parts, whole * scale.float().repeat_interleave(columns // scale.shape[1], dim=1)


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
