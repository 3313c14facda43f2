"""Matrices of 8- and 4-bit integers with scales, packed by hand as docs/format.md says: one value after the other."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from support.matrices import pruned_24
from torch import Tensor
from torch._ops import OpOverload

from sparsify.runtime import ops

LAYOUTS = ("packed24", "bitmask", "dense")
LINEAR = {"packed24": ops.linear_24_few, "bitmask": ops.linear_bitmask_few, "dense": ops.linear_dense_few}
EXPERTS = {"packed24": ops.experts_24_few, "bitmask": ops.experts_bitmask_few, "dense": ops.experts_dense_few}


@dataclass(frozen=True)
class Few:
    """A packed matrix, and the dense one that it stands for."""

    layout: str
    bits: int
    group: int
    tensors: list[Tensor] = field(repr=False)  # scales, values, and codes and starts where the layout has them
    dense: Tensor = field(repr=False)
    unrounded: Tensor = field(repr=False)  # scale times integer, in float64

    def linear(self, x: Tensor, exact: bool = False, bias: Tensor | None = None) -> Tensor:
        return LINEAR[self.layout](x, *self.tensors, self.bits, self.group, exact, bias)

    @property
    def operator(self) -> OpOverload[..., Tensor]:
        return LINEAR[self.layout]


def few(
    layout: str,
    rows: int,
    columns: int,
    bits: int,
    group: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    zeros: float = 0.5,
) -> Few:
    """A random matrix with every integer that ``bits`` have; 2:4 where the layout needs it."""
    generator = torch.Generator().manual_seed(seed)
    low = -128 if bits == 8 else -8
    integers = torch.randint(low, -low, (rows, columns), generator=generator)
    if layout == "packed24":
        integers *= pruned_24(rows, columns, seed=seed).ne(0)
    elif layout == "bitmask":
        integers *= torch.rand(rows, columns, generator=generator) >= zeros
    groups = -(-columns // group) if group else 1
    # Scales are numbers that float16 and the dtype hold, and may be negative.
    scales = (torch.randn(rows, groups, generator=generator) / -low).bfloat16().half().to(dtype)
    return pack_few(integers, scales, layout, bits, group)


def pack_few(integers: Tensor, scales: Tensor, layout: str, bits: int, group: int) -> Few:
    rows, columns = integers.shape
    each = scales.float().repeat_interleave(group or columns, 1)[:, :columns]
    dense = (each * integers).to(scales.dtype)
    full = torch.zeros(rows, -(-columns // 128) * 128, dtype=torch.long)
    full[:, :columns] = integers
    if layout == "packed24":
        tensors = _pack_24(full, bits)
    elif layout == "bitmask":
        tensors = _pack_bitmask(full, bits)
    else:
        tensors = [torch.tensor([_bytes(row, bits) for row in full.tolist()], dtype=_stored(bits)).view(rows, -1)]
    return Few(layout, bits, group, [scales, *tensors], dense, each.double() * integers)


def _stored(bits: int) -> torch.dtype:
    return torch.int8 if bits == 8 else torch.uint8


def _bytes(integers: list[int], bits: int) -> list[int]:
    """Eight bits each, or two to a byte in two's complement, the first in the low nibble and a zero to fill up."""
    if bits == 8:
        return integers
    even = integers + [0] * (len(integers) % 2)
    return [(a & 15) | (b & 15) << 4 for a, b in zip(even[::2], even[1::2], strict=True)]


def _pack_24(full: Tensor, bits: int) -> list[Tensor]:
    values, codes = [], []
    for row in full.tolist():
        kept, nibbles = [], []
        for g in range(0, len(row), 4):
            group = row[g : g + 4]
            places = [i for i in range(4) if group[i]]
            for spare in range(4):
                if len(places) < 2 and spare not in places:
                    places = sorted([*places, spare])
            kept += [group[i] for i in places]
            nibbles.append(places[0] | places[1] << 2)
        values.append(_bytes(kept, bits))
        codes.append([a | b << 4 for a, b in zip(nibbles[::2], nibbles[1::2], strict=True)])
    rows = len(full)
    return [
        torch.tensor(values, dtype=_stored(bits)).view(rows, -1),
        torch.tensor(codes, dtype=torch.uint8).view(rows, -1),
    ]


def _pack_bitmask(full: Tensor, bits: int) -> list[Tensor]:
    values: list[int] = []
    words, starts = [], [0]
    for row in full.tolist():
        for block in range(0, len(row), 64):
            values += _bytes([v for v in row[block : block + 64] if v], bits)
        for word in range(0, len(row), 32):
            number = sum(1 << i for i, v in enumerate(row[word : word + 32]) if v)
            words.append(number - (1 << 32) if number >> 31 else number)
        starts.append(len(values))
    return [
        torch.tensor(values + [0] * 64, dtype=_stored(bits)),
        torch.tensor(words, dtype=torch.int32).view(len(full), -1),
        torch.tensor(starts),
    ]
