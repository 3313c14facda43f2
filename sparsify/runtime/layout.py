"""Packed layouts of a pruned matrix, and the way there and back. ``docs/format.md`` is their specification.

- ``packed24``: of every four consecutive inputs two values, and a nibble that says which two;
- ``bitmask``: one bit per weight, and the values that are not zero, row after row;
- ``dense``: every value, of matrices of few bits alone (:mod:`sparsify.runtime.few_bits`).

The first two take 9/16 of a 16-bit matrix and 17/32 of a float32 one at half zeros. A weight is zero where it compares
equal to zero, so -0.0 comes back as 0.0; all else comes back bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsify.errors import PatternError, Refused
from sparsify.runtime import few_bits
from sparsify.runtime.codes import at_most_two, pack_bits, pack_pairs, unpack_bits, unpack_pairs
from sparsify.runtime.few_bits import Integers
from sparsify.runtime.words import AskedFewLayout, Layout

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Columns are padded to a multiple of this, and a bitmask's values by as many zeros: kernels read whole vectors.
UNIT = 64
PADDING = 64


@dataclass(frozen=True)
class Packed:
    """A matrix [rows, columns] as stored.

    Attributes:
        values: [rows, padded / 2] for packed24; [kept + PADDING] for a bitmask; in the matrix's dtype.
        codes: packed24: uint8 [rows, padded / 8], even groups in the low nibble; bitmask: int32 [rows, padded / 32],
            column 0 in the lowest bit; dense: uint8 [rows, 0]. ``padded`` is ``columns`` rounded up to UNIT.
        scales, bits, group: of a matrix of few bits, as in :class:`Integers`; its values are int8, or uint8 of two
            integers each, and its padding is that of :mod:`sparsify.runtime.few_bits`.
    """

    layout: Layout
    shape: tuple[int, int]
    values: Tensor
    codes: Tensor
    scales: Tensor | None = None
    bits: int | None = None
    group: int | None = None

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.codes.nbytes + (0 if self.scales is None else self.scales.nbytes)

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix."""
        return self.values.dtype if self.scales is None else self.scales.dtype


def padded(columns: int, bits: int | None = None) -> int:
    """``columns`` and what pads them, of full width or of few ``bits``."""
    return -(-columns // UNIT) * UNIT if bits is None else few_bits.padded(columns)


def holds_24(weight: Tensor) -> bool:
    """Whether no four consecutive inputs of ``weight`` [rows, columns] hold more than two values."""
    return at_most_two(_with_columns(weight != 0, padded(weight.shape[1])))


def packed_bytes(weight: Tensor, layout: Layout) -> int:
    """Bytes that ``weight`` would take."""
    rows, columns = weight.shape
    cells, size = rows * padded(columns), weight.element_size()
    if layout == "packed24":
        return cells // 2 * size + cells // 8
    return (int(torch.count_nonzero(weight)) + PADDING) * size + cells // 8


def choose_layout(weight: Tensor, asked: AskedFewLayout = "auto") -> Layout | Refused:
    """The layout of ``weight`` [rows, columns], or why it is better left dense.

    Args:
        asked: ``auto`` takes packed24 where the pattern holds: a 2:4 matrix of many more zeros would be smaller as a
            bitmask, and is faster so, whatever the processor.
    """
    if weight.dtype not in DTYPES:
        return Refused(f"of {weight.dtype}, which no packed kernel has")
    if asked == "dense":
        return Refused("no grid of 8 or 4 bits holds it, and dense packs nothing else")
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
    if not at_most_two(kept):
        raise PatternError(
            f"packing a matrix {list(weight.shape)} as packed24",
            found="four consecutive inputs with more than two values",
            do="Prune it to 2:4 along its inputs, or pack it as bitmask",
        )
    # A stored zero is +0.0 whatever it was.
    values, codes = pack_pairs(full.masked_fill(~kept, 0).view(-1, 4), kept.view(-1, 4))
    return Packed(layout, (rows, columns), values.view(rows, -1), codes.view(rows, -1))


def pack_integers(matrix: Integers, layout: Layout) -> Packed:
    """Pack a matrix of few bits.

    Raises:
        PatternError: for packed24 a group of more than two values.
    """
    values, codes = few_bits.stored(matrix, layout)
    return Packed(layout, matrix.shape, values, codes, matrix.scales.contiguous(), matrix.bits, matrix.group)


def unpack(packed: Packed) -> Tensor:
    """The matrix [rows, columns] that was packed. Plain torch, on any device."""
    rows, columns = packed.shape
    if packed.scales is not None and packed.bits is not None:
        whole = few_bits.expanded(packed.layout, packed.bits, packed.values, packed.codes)
        return few_bits.scaled(whole[:, :columns], packed.scales, packed.group)
    if packed.layout == "packed24":
        return unpack_pairs(packed.values.reshape(-1, 2), packed.codes).view(rows, -1)[:, :columns].contiguous()
    kept = unpack_bits(packed.codes.contiguous().view(torch.uint8)).view(rows, -1)
    full = packed.values.new_zeros(kept.shape)
    full[kept] = packed.values[: packed.values.numel() - PADDING]
    return full[:, :columns].contiguous()


def concatenate(parts: Sequence[Packed]) -> Packed:
    """Matrices of one layout, width, bits and group, one below the other."""
    layout, columns = parts[0].layout, parts[0].shape[1]
    values, scales = [p.values for p in parts], [p.scales for p in parts if p.scales is not None]
    if layout == "bitmask":
        values = [*(v[:-PADDING] for v in values[:-1]), values[-1]]
    whole = Packed(
        layout, (sum(p.shape[0] for p in parts), columns), torch.cat(values), torch.cat([p.codes for p in parts])
    )
    return replace(whole, scales=torch.cat(scales), bits=parts[0].bits, group=parts[0].group) if scales else whole


def _with_columns(matrix: Tensor, columns: int) -> Tensor:
    """``matrix``, contiguous, with zero columns added on the right up to ``columns``."""
    if matrix.shape[1] == columns:
        return matrix.contiguous()
    full = matrix.new_zeros(matrix.shape[0], columns)
    full[:, : matrix.shape[1]] = matrix
    return full
