"""Packed storage of a matrix with zeros, and the standard operators that unpack it.

Two formats, each one bit per weight and the values that are not zero:

- ``2:4``: per group of four consecutive inputs two values, and one byte of 2-bit positions per two groups;
- ``bitmask``: one bit per weight in row-major order, least significant bit first, and the values in that order.

A weight counts as zero where all its bits are zero: -0.0 is kept as a value, so unpacking is exact to the bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Format = Literal["2:4", "bitmask", "dense"]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Packed:
    """``codes``: uint8; ``values``: [groups, 2] for 2:4, [number of values] for a bitmask, in the matrix's dtype."""

    format: Format
    shape: tuple[int, ...]
    values: Tensor
    codes: Tensor

    @property
    def nbytes(self) -> int:
        return self.values.numel() * self.values.element_size() + self.codes.numel()


def best_format(weight: Tensor) -> Format:
    """The format of the fewest bytes for ``weight``; 2:4 before a bitmask of the same size, dense where none pays."""
    if weight.dim() < 2 or not weight.is_floating_point():
        return "dense"
    kept = nonzero_bits(weight)
    width, size = weight.shape[-1], weight.element_size()
    mask_bytes = -(-weight.numel() // 8) + max(1, int(kept.sum())) * size
    best: Format = "bitmask" if mask_bytes < weight.numel() * size else "dense"
    if width % 8 == 0 and bool((kept.view(-1, 4).sum(1) <= 2).all()):
        pair_bytes = weight.numel() // 8 + weight.numel() // 2 * size
        # A row with fewer values than half makes the mask smaller, but its unpacking costs 1.5 times the memory.
        if pair_bytes <= mask_bytes * 1.05:
            return "2:4"
    return best


def nonzero_bits(weight: Tensor) -> Tensor:
    """Where a value has any bit set: bool, of ``weight``'s shape."""
    return as_bits(weight) != 0


def as_bits(tensor: Tensor) -> Tensor:
    """The bits of ``tensor`` as integers of its size, which tell -0.0 from 0.0 and one NaN from another."""
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()])


def pack(weight: Tensor, form: Format) -> Packed:
    """Pack ``weight`` [..., in_features] as ``2:4`` or ``bitmask``; :func:`unpack` gives it back bit for bit."""
    kept = nonzero_bits(weight)
    if form == "bitmask":
        if not bool(kept.any()):
            # One zero is stored as a value: onnxruntime reads an empty dimension as "copy it from the input".
            kept.view(-1)[0] = True
        return Packed(form, tuple(weight.shape), weight.contiguous().view(-1)[kept.view(-1)], pack_bits(kept.view(-1)))
    groups, kept = weight.contiguous().view(-1, 4), kept.view(-1, 4)
    # Kept positions first, each kind in order; a group of fewer than two is filled with zeros of its own.
    order = torch.argsort((~kept).to(torch.uint8), dim=1, stable=True)[:, :2]
    order = order.sort(dim=1).values
    values = groups.gather(1, order)
    positions = order.to(torch.uint8).view(-1, 4)
    codes = positions[:, 0] | positions[:, 1] << 2 | positions[:, 2] << 4 | positions[:, 3] << 6
    return Packed(form, tuple(weight.shape), values, codes)


def unpack(packed: Packed) -> Tensor:
    """The matrix that was packed, of shape ``packed.shape``."""
    size = math.prod(packed.shape)
    if packed.format == "bitmask":
        flat = torch.zeros(size, dtype=packed.values.dtype)
        flat[unpack_bits(packed.codes)[:size]] = packed.values
        return flat.view(packed.shape)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)
    positions = (packed.codes[:, None] >> shifts & 3).view(-1, 2).long()
    groups = torch.zeros(size // 4, 4, dtype=packed.values.dtype)
    return groups.scatter_(1, positions, packed.values.view(-1, 2)).view(packed.shape)


def pack_bits(bits: Tensor) -> Tensor:
    """Booleans [n] as uint8 [ceil(n / 8)], least significant bit first."""
    padded = torch.zeros(-(-bits.numel() // 8) * 8, dtype=torch.uint8)
    padded[: bits.numel()] = bits
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    return (padded.view(-1, 8) * weights).sum(1, dtype=torch.uint8)


def unpack_bits(codes: Tensor) -> Tensor:
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    return (codes[:, None] & weights).ne(0).view(-1)


def unpacking_bytes(packed_format: Format, numel: int, values: int, size: int) -> int:
    """Bytes that onnxruntime holds while it unpacks one matrix: every intermediate lives until all are folded.

    Args:
        numel: weights; ``values``: those stored; ``size``: bytes of one in the graph's dtype.
    """
    if packed_format == "2:4":
        # shifted, masked, reshaped: bytes; positions: int32; scattered, reshaped: values.
        return numel // 8 + 3 * (numel // 2) + 4 * (numel // 2) + values * size + 2 * numel * size
    # masked, reshaped: bytes; positions twice: int64; scattered, reshaped: values.
    return numel // 8 + 2 * numel + 2 * 8 * values + values * size + 2 * numel * size
