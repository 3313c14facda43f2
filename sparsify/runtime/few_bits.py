"""Matrices of few bits: integers of 8 or 4 bits, a scale for each group of columns, and how they lie packed.

A value is scale · integer, exact in float32 and rounded once to the dtype of the scales. ``docs/format.md`` specifies
the bytes; :mod:`sparsify.runtime.layout` puts them together with the rest of a packed matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsify.errors import PatternError, Refused
from sparsify.runtime.codes import (
    at_most_two,
    block_bytes,
    pack_bits,
    pack_nibbles,
    pack_pairs,
    places,
    unpack_bits,
    unpack_nibbles,
    unpack_pairs,
)
from sparsify.runtime.words import AskedFewLayout, Layout

BITS = (8, 4)
# Columns are padded to a multiple of UNIT: kernels take so many at a step. A bitmask's bytes are followed by PADDING.
UNIT = 128
PADDING = 64
# Values that are multiplied with their scales at once, in float32.
_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Integers:
    """A matrix [rows, columns] as integers and scales.

    Attributes:
        values: int8 [rows, columns]: -128 … 127, or with 4 bits -8 … 7.
        scales: [rows, ceil(columns / group)], [rows, 1] where a row is one group, in the dtype of the matrix.
        group: columns that share a scale; None: those of a whole row.
    """

    values: Tensor
    scales: Tensor
    bits: int
    group: int | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def rows(self, count: int) -> Integers:
        """The first ``count`` rows."""
        return replace(self, values=self.values[:count], scales=self.scales[:count])

    def dense(self) -> Tensor:
        """The matrix, in the dtype of the scales."""
        return scaled(self.values, self.scales, self.group)


def padded(columns: int) -> int:
    return -(-columns // UNIT) * UNIT


def groups(columns: int, group: int | None) -> int:
    """How many scales a row of ``columns`` has."""
    return 1 if group is None else -(-columns // group)


def scaled(integers: Tensor, scales: Tensor, group: int | None) -> Tensor:
    """``integers`` [rows, columns] times their scales, in the dtype of those; some rows at a time."""
    rows, columns = integers.shape
    out = scales.new_empty(rows, columns)
    step = max(1, _AT_ONCE // max(1, columns))
    for first in range(0, rows, step):
        each = scales[first : first + step].float()
        if group is not None:
            each = each.repeat_interleave(group, dim=1)[:, :columns]
        # Zero times a negative scale is -0.0, to which adding zero gives 0.0, and to nothing else another value.
        out[first : first + step] = integers[first : first + step].float().mul_(each).add_(0.0)
    return out


def stored(matrix: Integers, layout: Layout) -> tuple[Tensor, Tensor]:
    """The values and codes of ``matrix`` as they lie packed; the codes of ``dense`` are empty.

    Raises:
        PatternError: packed24, and four consecutive inputs of more than two values.
    """
    rows, columns = matrix.shape
    full = torch.nn.functional.pad(matrix.values, (0, padded(columns) - columns)).contiguous()
    kept = full != 0
    if layout == "bitmask":
        return _in_row(full, kept, matrix.bits), pack_bits(kept).view(torch.int32)
    codes = torch.empty(rows, 0, dtype=torch.uint8, device=full.device)
    if layout == "packed24":
        if not at_most_two(kept):
            raise PatternError(
                f"packing a matrix {[rows, columns]} as packed24",
                found="four consecutive inputs with more than two values",
                do="Prune it to 2:4 along its inputs, or pack it as bitmask",
            )
        pairs, codes = pack_pairs(full.view(-1, 4), kept.view(-1, 4))
        full, codes = pairs.view(rows, -1), codes.view(rows, -1)
    return (full if matrix.bits == 8 else pack_nibbles(full)), codes


def expanded(layout: Layout, bits: int, values: Tensor, codes: Tensor) -> Tensor:
    """Undo :func:`stored`: int8 [rows, padded columns]. Plain torch, on any device."""
    rows = codes.shape[0]
    if layout == "bitmask":
        kept = unpack_bits(codes.contiguous().view(torch.uint8)).view(rows, -1)
        full = torch.zeros(kept.shape, dtype=torch.int8, device=values.device)
        if bits == 8:
            full[kept] = values[: values.numel() - PADDING]
        else:
            full[kept] = unpack_nibbles(values)[places(kept)]
        return full
    whole = values if bits == 8 else unpack_nibbles(values)
    return whole if layout == "dense" else unpack_pairs(whole.reshape(-1, 2), codes).view(rows, -1)


def stored_bytes(matrix: Integers, layout: Layout) -> int:
    """Bytes that ``matrix`` would take, scales included."""
    rows, columns = matrix.shape
    cells, per_byte = rows * padded(columns), 8 // matrix.bits
    if layout == "dense":
        count = cells // per_byte
    elif layout == "packed24":
        count = cells // 2 // per_byte + cells // 8
    else:
        kept = torch.nn.functional.pad(matrix.values != 0, (0, padded(columns) - columns))
        values = int(block_bytes(kept).sum()) if matrix.bits == 4 else int(kept.sum())
        count = values + PADDING + cells // 8
    return count + matrix.scales.nbytes


def choose_few_layout(matrix: Integers, asked: AskedFewLayout = "auto") -> Layout | Refused:
    """The layout of ``matrix``, or why it is better left dense in its dtype.

    Args:
        asked: ``auto`` takes packed24 where the pattern holds, else whichever of a bitmask and ``dense`` is smaller. Of
            a matrix of fewer than UNIT columns, which is mostly padding, it takes the smallest.
    """
    rows, columns = matrix.shape
    padding = (0, -columns % 4)
    pairs = asked in ("auto", "packed24") and at_most_two(torch.nn.functional.pad(matrix.values != 0, padding))
    if asked == "packed24" and not pairs:
        return Refused("not 2:4 along its inputs")
    layouts: tuple[Layout, ...] = ("dense", "bitmask")
    if pairs:
        layouts = ("packed24",) if asked != "auto" or columns >= UNIT else ("packed24", *layouts)
    elif asked != "auto":
        layouts = (asked,)
    sizes = {layout: stored_bytes(matrix, layout) for layout in layouts}
    best = min(layouts, key=lambda layout: sizes[layout])
    if sizes[best] < rows * columns * matrix.scales.element_size():
        return best
    return Refused(f"too small for integers and scales to take less ({rows}×{columns})")


def _in_row(full: Tensor, kept: Tensor, bits: int) -> Tensor:
    """The kept of ``full`` one after the other, with PADDING behind: int8, or two to a byte by blocks of 64 columns."""
    if bits == 8:
        return torch.cat([full[kept], full.new_zeros(PADDING)])
    nibbles = full.new_zeros(2 * (int(block_bytes(kept).sum()) + PADDING))
    nibbles[places(kept)] = full[kept]
    return pack_nibbles(nibbles)
