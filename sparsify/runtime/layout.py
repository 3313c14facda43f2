"""Packed layouts of a pruned matrix, and the way there and back. ``docs/format.md`` is their specification.

- ``packed24``: of every four consecutive inputs two values, and a nibble that says which two;
- ``bitmask``: one bit per weight, and the values that are not zero, row after row.

Both take 9/16 of a 16-bit matrix and 17/32 of a float32 one at half zeros. A weight is zero where it compares equal to
zero, so -0.0 comes back as 0.0; all else comes back bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparsify.errors import CheckpointError, PatternError, Refused
from sparsify.runtime.cpu import native

Layout = Literal["packed24", "bitmask"]
LAYOUTS: tuple[Layout, ...] = ("packed24", "bitmask")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Columns are padded to a multiple of this, and a bitmask's values by as many zeros: kernels read whole vectors.
UNIT = 64
PADDING = 64

# For the four kept-bits of a group, its nibble idx0 | idx1 << 2, idx0 < idx1; a group of fewer than two is filled up
# with zeros of its own. These six codes are the ones that NVIDIA's sparse tensor cores take.
_NIBBLES = (4, 4, 4, 4, 8, 8, 9, 0, 12, 12, 13, 0, 14, 0, 0, 0)


@dataclass(frozen=True)
class Packed:
    """A matrix [rows, columns] as stored.

    Attributes:
        values: [rows, padded / 2] for packed24; [kept + PADDING] for a bitmask; in the matrix's dtype.
        codes: packed24: uint8 [rows, padded / 8], even groups in the low nibble; bitmask: int32 [rows, padded / 32],
            column 0 in the lowest bit. ``padded`` is ``columns`` rounded up to UNIT.
    """

    layout: Layout
    shape: tuple[int, int]
    values: Tensor
    codes: Tensor

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.codes.nbytes


def padded(columns: int) -> int:
    return -(-columns // UNIT) * UNIT


def holds_24(weight: Tensor) -> bool:
    """Whether no four consecutive inputs of ``weight`` [rows, columns] hold more than two values."""
    kept = _with_columns(weight != 0, padded(weight.shape[1]))
    return bool((kept.view(-1, 4).sum(1, dtype=torch.uint8) <= 2).all())


def packed_bytes(weight: Tensor, layout: Layout) -> int:
    """Bytes that ``weight`` would take."""
    rows, columns = weight.shape
    cells, size = rows * padded(columns), weight.element_size()
    if layout == "packed24":
        return cells // 2 * size + cells // 8
    return (int(torch.count_nonzero(weight)) + PADDING) * size + cells // 8


def choose_layout(weight: Tensor, asked: str = "auto") -> Layout | Refused:
    """The layout of ``weight`` [rows, columns], or why it is better left dense.

    Args:
        asked: ``auto`` takes packed24 where the pattern holds: a 2:4 matrix of many more zeros would be smaller as a
            bitmask, and is faster so, whatever the processor.
    """
    if weight.dtype not in DTYPES:
        return Refused(f"of {weight.dtype}, which no packed kernel has")
    zeros = 1 - int(torch.count_nonzero(weight)) / max(1, weight.numel())
    if zeros == 0:
        return Refused("no zeros")
    if bool(weight.isnan().any()):
        return Refused("it holds NaN")
    pairs = asked != "bitmask" and holds_24(weight)
    if asked == "packed24" and not pairs:
        return Refused("not 2:4 along its inputs")
    layouts: tuple[Layout, ...] = ("packed24", "bitmask") if pairs else ("bitmask",)
    if asked != "auto":
        layouts = layouts[:1]
    dense = weight.numel() * weight.element_size()
    for layout in layouts:
        if packed_bytes(weight, layout) < dense:
            return layout
    return Refused(f"{zeros:.0%} zeros, too few to make it smaller")


def pack(weight: Tensor, layout: Layout) -> Packed:
    """Pack ``weight`` [rows, columns].

    Raises:
        PatternError: no matrix, a dtype that kernels do not have, a NaN, or for packed24 a group of more than two
        values.
    """
    if weight.dim() != 2 or weight.dtype not in DTYPES:
        raise PatternError(
            f"packing a tensor {list(weight.shape)} of {weight.dtype}",
            found=f"{layout} holds matrices of {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}",
            do="Reshape or convert it",
        )
    if bool(weight.isnan().any()):
        raise PatternError(f"packing a matrix {list(weight.shape)}", found="a NaN", do="Mend the weights first")
    rows, columns = weight.shape
    full = _with_columns(weight.detach(), padded(columns))
    kept = full != 0
    if layout == "bitmask":
        values = torch.cat([full[kept], full.new_zeros(PADDING)])
        return Packed(layout, (rows, columns), values, pack_bits(kept).view(torch.int32))
    if bool((kept.view(-1, 4).sum(1, dtype=torch.uint8) > 2).any()):
        raise PatternError(
            f"packing a matrix {list(weight.shape)} as packed24",
            found="four consecutive inputs with more than two values",
            do="Prune it to 2:4 along its inputs, or pack it as bitmask",
        )
    # A stored zero is +0.0 whatever it was.
    values, codes = pack_pairs(full.masked_fill(~kept, 0).view(-1, 4), kept.view(-1, 4))
    return Packed(layout, (rows, columns), values.view(rows, -1), codes.view(rows, -1))


def unpack(packed: Packed) -> Tensor:
    """The matrix [rows, columns] that was packed. Plain torch, on any device."""
    rows, columns = packed.shape
    if packed.layout == "packed24":
        return unpack_pairs(packed.values.reshape(-1, 2), packed.codes).view(rows, -1)[:, :columns].contiguous()
    kept = unpack_bits(packed.codes.view(torch.uint8)).view(rows, -1)
    full = packed.values.new_zeros(kept.shape)
    full[kept] = packed.values[: packed.values.numel() - PADDING]
    return full[:, :columns].contiguous()


def row_starts(mask: Tensor) -> Tensor:
    """Where each row's values begin in a bitmask's values, and where the last ends: int64 [rows + 1]."""
    if (library := native.library() if mask.device.type == "cpu" else None) is not None:
        mask = mask.contiguous()
        starts = torch.zeros(mask.shape[0] + 1, dtype=torch.int64)
        library.row_starts(native.isa(), mask.data_ptr(), mask.shape[0], mask.shape[1], starts.data_ptr())
        return starts
    counts = torch.tensor([i.bit_count() for i in range(256)], dtype=torch.uint8, device=mask.device)
    rows = mask.shape[0]
    starts = torch.zeros(rows + 1, dtype=torch.int64, device=mask.device)
    # Some rows at a time: looking bytes up takes eight bytes for each.
    step = max(1, (1 << 22) // max(1, mask.shape[1]))
    for at in range(0, rows, step):
        part = mask[at : at + step].contiguous().view(torch.uint8)
        starts[at + 1 : at + 1 + part.shape[0]] = counts[part.int()].sum(1, dtype=torch.int64)
    return starts.cumsum_(0)


def check(name: str, packed: Packed) -> None:
    """Check that the tensors of ``packed`` fit each other and hold nothing that a kernel could stumble over.

    Raises:
        CheckpointError: shapes or dtypes that disagree, a code that is none, values that are too few or too many.
    """

    def fail(found: str) -> CheckpointError:
        return CheckpointError(
            f"packed tensor {name}", found=found, do="The folder is damaged or not of this format: pack it again"
        )

    (rows, columns), full = packed.shape, padded(packed.shape[1])
    values, codes = packed.values, packed.codes
    kind, width = (torch.uint8, full // 8) if packed.layout == "packed24" else (torch.int32, full // 32)
    if rows < 1 or columns < 1 or values.dtype not in DTYPES:
        raise fail(f"a matrix {[rows, columns]} of {values.dtype}")
    if codes.dtype != kind or list(codes.shape) != [rows, width]:
        raise fail(f"codes {list(codes.shape)} of {codes.dtype} where {[rows, width]} of {kind} belong")
    if packed.layout == "packed24":
        if list(values.shape) != [rows, full // 2]:
            raise fail(f"values {list(values.shape)} where {[rows, full // 2]} belong")
        if not _ascending(codes):
            raise fail("a code that is not two ascending positions of four")
        if full > columns:
            held = unpack_pairs(values.reshape(-1, 2), codes).view(rows, full)[:, columns:]
            if bool(held.any()):
                raise fail("values in the columns that only pad the matrix")
        return
    total = int(row_starts(codes)[-1])
    if values.dim() != 1 or values.numel() != total + PADDING:
        raise fail(f"values {list(values.shape)} for a mask that counts {total} and {PADDING} of padding")
    if bool(values[total:].any()):
        raise fail("padding after the values that is not zero")
    if full > columns and bool(unpack_bits(codes.contiguous().view(torch.uint8)).view(rows, full)[:, columns:].any()):
        raise fail("a mask that keeps columns which only pad the matrix")


def _ascending(codes: Tensor) -> bool:
    """Whether every nibble is two ascending positions."""
    if (library := native.library() if codes.device.type == "cpu" else None) is not None:
        codes = codes.contiguous()
        return bool(library.check_24(codes.data_ptr(), codes.numel()))
    return bool((((codes >> 2 & 3) > (codes & 3)) & ((codes >> 6) > (codes >> 4 & 3))).all())


def concatenate(parts: list[Packed]) -> Packed:
    """Matrices of one layout and width, one below the other."""
    layout, columns = parts[0].layout, parts[0].shape[1]
    values = [p.values for p in parts]
    if layout == "bitmask":
        values = [*(v[:-PADDING] for v in values[:-1]), values[-1]]
    shape = (sum(p.shape[0] for p in parts), columns)
    return Packed(layout, shape, torch.cat(values), torch.cat([p.codes for p in parts]))


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


def pack_bits(bits: Tensor) -> Tensor:
    """Booleans [..., n] as uint8 [..., ceil(n / 8)], the first in the lowest bit."""
    if left := -bits.shape[-1] % 8:
        bits = torch.cat([bits, bits.new_zeros(*bits.shape[:-1], left)], dim=-1)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    return (bits.reshape(*bits.shape[:-1], -1, 8).to(torch.uint8) * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(codes: Tensor) -> Tensor:
    """Undo :func:`pack_bits`, flat."""
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=codes.device)
    return (codes.reshape(-1, 1) & weights).ne(0).view(-1)


def _with_columns(matrix: Tensor, columns: int) -> Tensor:
    """``matrix``, contiguous, with zero columns added on the right up to ``columns``."""
    if matrix.shape[1] == columns:
        return matrix.contiguous()
    full = matrix.new_zeros(matrix.shape[0], columns)
    full[:, : matrix.shape[1]] = matrix
    return full
