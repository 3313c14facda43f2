"""Matrices that the tests of packing share, and the format read by hand from docs/format.md."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 4e-3}


def pruned_24(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random [rows, columns] with two values in every four consecutive columns."""
    generator = torch.Generator().manual_seed(seed)
    full = -(-columns // 4) * 4
    kept = torch.rand(rows, full // 4, 4, generator=generator).topk(2, dim=-1).indices
    mask = torch.zeros(rows, full // 4, 4).scatter_(-1, kept, 1.0).view(rows, full)[:, :columns]
    return (torch.randn(rows, columns, generator=generator) * mask).to(dtype)


def pruned(rows: int, columns: int, zeros: float, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=generator) >= zeros
    return (torch.randn(rows, columns, generator=generator) * kept).to(dtype)


def error(got: Tensor, exact: Tensor) -> float:
    """‖got − exact‖/‖exact‖ in float64."""
    return float((got.double() - exact).norm() / exact.norm().clamp(min=1e-300))


def by_hand_24(values: Tensor, meta: Tensor, rows: int, columns: int) -> Tensor:
    """packed24 to dense, one value after the other."""
    out = torch.zeros(rows, columns, dtype=values.dtype)
    for r in range(rows):
        for group in range(-(-columns // 4)):
            nibble = int(meta[r, group // 2]) >> (4 * (group % 2)) & 15
            for which, place in enumerate((nibble & 3, nibble >> 2)):
                column = 4 * group + place
                value = values[r, 2 * group + which]
                if column < columns:
                    out[r, column] = value
                else:
                    assert value == 0
    return out


def by_hand_bitmask(values: Tensor, mask: Tensor, rows: int, columns: int) -> Tensor:
    """bitmask to dense, one bit after the other."""
    out, at = torch.zeros(rows, columns, dtype=values.dtype), 0
    for r in range(rows):
        for column in range(mask.shape[1] * 32):
            if int(mask[r, column // 32]) >> (column % 32) & 1:
                out[r, column] = values[at]
                at += 1
    assert values.numel() == at + 64 and not bool(values[at:].any())
    return out
