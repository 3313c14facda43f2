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

from sparsify.runtime.codes import at_most_two, pack_bits, pack_pairs, unpack_bits, unpack_pairs
from sparsify.runtime.words import Layout

Format = Literal["2:4", "bitmask", "dense"]
# What the layouts of the runtime are called here.
FORMATS: dict[Layout, Format] = {"packed24": "2:4", "bitmask": "bitmask", "dense": "dense"}

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class PackedTensor:
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
    if width % 8 == 0 and at_most_two(kept):
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


def pack_tensor(weight: Tensor, form: Format) -> PackedTensor:
    """Pack ``weight`` [..., in_features] as ``2:4`` or ``bitmask``; :func:`unpack_tensor` gives it back bit for bit."""
    kept = nonzero_bits(weight)
    if form == "bitmask":
        if not bool(kept.any()):
            # One zero is stored as a value: onnxruntime reads an empty dimension as "copy it from the input".
            kept.view(-1)[0] = True
        flat = kept.view(-1)
        return PackedTensor(form, tuple(weight.shape), weight.contiguous().view(-1)[flat], pack_bits(flat))
    values, codes = pack_pairs(weight.contiguous().view(-1, 4), kept.view(-1, 4))
    return PackedTensor(form, tuple(weight.shape), values, codes)


def misfit(packed: PackedTensor) -> str | None:
    """Why what a file holds is no packed tensor of its shape; None where it is one."""
    size, values, codes = math.prod(packed.shape), packed.values, packed.codes
    if codes.dtype != torch.uint8 or not values.is_floating_point():
        return f"codes of {codes.dtype} and values of {values.dtype}"
    if packed.format == "bitmask":
        if codes.numel() != -(-size // 8):
            return f"{codes.numel()} bytes of bits for {size} weights"
        kept = int(unpack_bits(codes)[:size].sum())
        return None if values.shape == (kept,) else f"values {list(values.shape)} for {kept} bits"
    if size % 8 or values.shape != (size // 4, 2) or codes.numel() != size // 8:
        return f"values {list(values.shape)} and {codes.numel()} bytes of codes for {size} weights"
    return None


def unpack_tensor(packed: PackedTensor) -> Tensor:
    """The matrix that was packed, of shape ``packed.shape``."""
    size = math.prod(packed.shape)
    if packed.format == "bitmask":
        flat = torch.zeros(size, dtype=packed.values.dtype)
        flat[unpack_bits(packed.codes)[:size]] = packed.values
        return flat.view(packed.shape)
    return unpack_pairs(packed.values, packed.codes).view(packed.shape)


def unpacking_bytes(packed_format: Format, numel: int, values: int, size: int) -> int:
    """Bytes that onnxruntime holds while it unpacks one matrix: every intermediate lives until all are folded.

    Args:
        numel: weights; ``values``: those stored; ``size``: bytes of one in the graph's dtype.
    """
    if packed_format == "dense":
        return 2 * numel * size
    if packed_format == "2:4":
        # shifted, masked, reshaped: bytes; positions: int32; scattered, reshaped: values.
        return numel // 8 + 3 * (numel // 2) + 4 * (numel // 2) + values * size + 2 * numel * size
    # masked, reshaped: bytes; positions twice: int64; scattered, reshaped: values.
    return numel // 8 + 2 * numel + 2 * 8 * values + values * size + 2 * numel * size
