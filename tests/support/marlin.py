"""Weights written as ``marlin-24``, one number at a time."""

from __future__ import annotations

import torch
from support.quantized import Tensors, pruned_24
from torch import Tensor


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


def written(weight: Tensor, bits: int, group: int | None) -> tuple[Tensors, Tensor]:
    """The parts of ``weight`` [rows, columns], and what it is then."""
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
