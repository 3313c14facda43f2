"""Which weights of a matrix are kept, as bits: a nibble for two of every four, or one bit each."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.errors import BackendError
from sparsify.runtime.cpu import native

# For the four kept-bits of a group, its nibble idx0 | idx1 << 2, idx0 < idx1; a group of fewer than two is filled up
# with zeros of its own. These six codes are the ones that NVIDIA's sparse tensor cores take.
_NIBBLES = (4, 4, 4, 4, 8, 8, 9, 0, 12, 12, 13, 0, 14, 0, 0, 0)
# Eight bytes of 0 and 1 times the first have these eight bits in their highest byte; the other two find them again.
_GATHER, _SPREAD, _EACH = 0x0102040810204080, 0x0101010101010101, 0x8040201008040201 - (1 << 64)
# Words of a mask whose bytes are looked up at once: that takes eight bytes for each.
_LOOKED_UP = 1 << 22


def at_most_two(kept: Tensor) -> bool:
    """Whether no four consecutive of the booleans ``kept`` [..., 4 n] have more than two set."""
    return bool((kept.reshape(-1, 4).sum(1, dtype=torch.uint8) <= 2).all())


def pack_pairs(groups: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Two values [n, 2] of each group [n, 4], and their positions, a nibble each: uint8 [n / 2]. ``n`` must be even."""
    bits = kept.to(torch.uint8)
    which = bits[:, 0] | bits[:, 1] << 1 | bits[:, 2] << 2 | bits[:, 3] << 3
    nibbles = torch.tensor(_NIBBLES, dtype=torch.uint8, device=groups.device)[which.int()]
    positions = torch.stack([nibbles & 3, nibbles >> 2], dim=1)
    return groups.gather(1, positions.long()), nibbles[::2] | nibbles[1::2] << 4


def unpack_pairs(values: Tensor, codes: Tensor) -> Tensor:
    """Undo :func:`pack_pairs`: [n, 2] and n nibbles to [n, 4]."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=codes.device)
    positions = (codes.reshape(-1, 1) >> shifts & 3).view(-1, 2)
    return values.new_zeros(positions.shape[0], 4).scatter_(1, positions.long(), values)


def ascending(codes: Tensor) -> bool:
    """Whether every nibble is two ascending positions."""
    if (kernels := native.library() if codes.device.type == "cpu" else None) is not None:
        codes = codes.contiguous()
        return bool(kernels.check_24(codes.data_ptr(), codes.nbytes))
    return bool((((codes >> 2 & 3) > (codes & 3)) & ((codes >> 6) > (codes >> 4 & 3))).all())


def pack_bits(bits: Tensor) -> Tensor:
    """Booleans [..., n] as uint8 [..., ceil(n / 8)], the first in the lowest bit."""
    if left := -bits.shape[-1] % 8:
        bits = torch.cat([bits, bits.new_zeros(*bits.shape[:-1], left)], dim=-1)
    return ((bits.contiguous().view(torch.int64) * _GATHER) >> 56).to(torch.uint8)


def unpack_bits(codes: Tensor) -> Tensor:
    """Undo :func:`pack_bits`, flat."""
    return codes.reshape(-1).to(torch.int64).mul_(_SPREAD).bitwise_and_(_EACH).view(torch.uint8).ne(0)


def pack_nibbles(whole: Tensor) -> Tensor:
    """Integers -8 … 7, int8 [..., 2 n], two to a byte: uint8 [..., n], the first in the low nibble."""
    low, high = whole[..., ::2].view(torch.uint8), whole[..., 1::2].view(torch.uint8)
    return (low & 15) | (high << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Undo :func:`pack_nibbles`."""
    low, high = (packed << 4).view(torch.int8), packed.view(torch.int8)
    # Shifts of signed integers carry the sign down.
    return torch.stack([low, high], dim=-1).flatten(-2) >> 4


def block_bytes(kept: Tensor) -> Tensor:
    """How many bytes the values of each block of 64 columns take, two to a byte: int64 [rows, blocks] of booleans
    [rows, 64 · blocks].
    """
    return (kept.unflatten(1, (-1, 64)).sum(-1) + 1) // 2


def places(kept: Tensor) -> Tensor:
    """Which nibble each of the ``kept`` is, where every block of 64 columns begins on a byte: int64, in their order."""
    counts = kept.view(-1, 64).sum(-1)
    odd = counts & 1
    # Every block with an odd number before it has one nibble to spare.
    spare = (odd.cumsum(0) - odd).repeat_interleave(counts)
    return torch.arange(len(spare), device=kept.device) + spare


def row_starts(mask: Tensor, bits: int | None = None) -> Tensor:
    """Where each row begins in a bitmask's values, and where the last ends: int64 [rows + 1].

    Args:
        bits: 4: in bytes, of which each block of 64 columns takes whole ones. Else a row's values are as many as its
            bits.

    Raises:
        BackendError: ``mask`` is not int32 [rows, words].
    """
    if mask.dim() != 2 or mask.dtype is not torch.int32 or (bits == 4 and mask.shape[1] % 2):
        raise BackendError(
            "the starts of a bitmask's rows", found=f"{list(mask.shape)} of {mask.dtype}", do="Give int32 [rows, words]"
        )
    kernels = native.library() if mask.device.type == "cpu" and bits != 4 else None
    if kernels is not None:
        mask = mask.contiguous()
        starts = torch.zeros(mask.shape[0] + 1, dtype=torch.int64)
        kernels.row_starts(native.isa(), mask.data_ptr(), mask.nbytes, *mask.shape, starts.data_ptr())
        return starts
    if bits == 4:
        return _starts_of_bytes(mask)
    counts = torch.tensor([i.bit_count() for i in range(256)], dtype=torch.uint8, device=mask.device)
    rows = mask.shape[0]
    starts = torch.zeros(rows + 1, dtype=torch.int64, device=mask.device)
    step = max(1, _LOOKED_UP // max(1, mask.shape[1]))
    for at in range(0, rows, step):
        part = mask[at : at + step].contiguous().view(torch.uint8)
        starts[at + 1 : at + 1 + part.shape[0]] = counts[part.int()].sum(1, dtype=torch.int64)
    return starts.cumsum_(0)


def _starts_of_bytes(mask: Tensor) -> Tensor:
    """:func:`row_starts` of values of 4 bits: the bits of 64 columns are counted at once, pairwise and pair by pair."""
    blocks = mask.contiguous().view(torch.int64)
    blocks = blocks - (blocks >> 1 & 0x5555555555555555)
    blocks = (blocks & 0x3333333333333333) + (blocks >> 2 & 0x3333333333333333)
    blocks = blocks + (blocks >> 4) & 0x0F0F0F0F0F0F0F0F
    counts = blocks * 0x0101010101010101 >> 56
    starts = torch.zeros(mask.shape[0] + 1, dtype=torch.int64, device=mask.device)
    torch.cumsum((counts + 1 >> 1).sum(1), 0, out=starts[1:])
    return starts
