"""A rank's part of a packed matrix, packed again: what runtimes that split layers over processes cut weights by.

Rows are cut where they lie. Columns are where the borders fall between the units that kernels read; elsewhere the part
is unpacked and packed again, and where no layout can hold it as it was (a cut within a group of four may leave three
values in a part of four, one within a group of columns of one scale has no scales of its own) it takes the next that
can, dense at the last: never other numbers.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd

import torch
from torch import Tensor

from sparsify.errors import PatternError
from sparsify.runtime import few_bits
from sparsify.runtime.codes import row_starts
from sparsify.runtime.few_bits import Integers
from sparsify.runtime.layout import PADDING, UNIT, Packed, choose_layout, holds_24, pack, pack_integers, unpack
from sparsify.runtime.words import Layout

# Groups of columns that share a scale, as a file may have them.
_SMALLEST_GROUP = 32


def rows_of(packed: Packed, first: int, count: int) -> Packed:
    """Rows [first, first + count): a copy, that holds on to nothing else.

    Raises:
        PatternError: the matrix has not so many.
    """
    _check_within(packed, first, count, packed.shape[0], "rows")
    if packed.layout == "bitmask":
        starts = row_starts(packed.codes, packed.bits)
        values = packed.values[int(starts[first]) : int(starts[first + count])]
        values = torch.cat([values, values.new_zeros(PADDING)])
    else:
        values = packed.values[first : first + count].clone()
    scales = None if packed.scales is None else packed.scales[first : first + count].clone()
    codes = packed.codes[first : first + count].clone()
    return replace(packed, shape=(count, packed.shape[1]), values=values, codes=codes, scales=scales)


def columns_of(packed: Packed, first: int, count: int) -> Packed | Tensor:
    """Columns [first, first + count): a copy; a dense matrix where no layout holds them, or none in less.

    Raises:
        PatternError: the matrix has not so many.
    """
    rows, columns = packed.shape
    _check_within(packed, first, count, columns, "columns")
    if (first, count) == (0, columns):
        return rows_of(packed, 0, rows)
    if packed.bits is not None and packed.scales is not None:
        return _few_columns(packed, packed.bits, packed.scales, first, count)
    ends = first + count == columns
    if packed.layout == "packed24" and first % UNIT == 0 and (count % UNIT == 0 or ends):
        last = packed.codes.shape[1] * 8 if ends else first + count
        values = packed.values[:, first // 2 : last // 2].contiguous()
        codes = packed.codes[:, first // 8 : last // 8].contiguous()
        return Packed(packed.layout, (rows, count), values.clone(), codes.clone())
    return _packed_again(unpack(packed)[:, first : first + count].contiguous(), packed.layout)


def _few_columns(packed: Packed, bits: int, scales: Tensor, first: int, count: int) -> Packed | Tensor:
    """Of integers: they stay what they are where every group of the part lies within one of the whole."""
    group = packed.group
    part = group if group is None else gcd(group, first) or group
    if part is not None and part < _SMALLEST_GROUP:
        dense = unpack(packed)[:, first : first + count].contiguous()
        return dense if packed.layout == "dense" else _packed_again(dense, packed.layout)
    whole = few_bits.expanded(packed.layout, bits, packed.values, packed.codes)[:, first : first + count]
    if group is not None and part is not None:
        scales = scales.repeat_interleave(group // part, dim=1)[:, first // part : -(-(first + count) // part)]
    integers = Integers(whole, scales.contiguous().clone(), bits, part)
    pairs = packed.layout == "packed24" and holds_24(whole)
    layout: Layout = "bitmask" if packed.layout == "packed24" and not pairs else packed.layout
    return pack_integers(integers, layout)


def _packed_again(dense: Tensor, layout: Layout) -> Packed | Tensor:
    """``dense`` as ``layout``, or as a bitmask, or as it is."""
    chosen = choose_layout(dense, "auto" if layout == "packed24" else "bitmask")
    return pack(dense, chosen) if isinstance(chosen, str) else dense


def _check_within(packed: Packed, first: int, count: int, whole: int, what: str) -> None:
    if not (first >= 0 and count > 0 and first + count <= whole):
        raise PatternError(
            f"{what} {first} to {first + count} of a packed matrix {list(packed.shape)}",
            found=f"it has {whole}",
            do="Take a number of ranks that the layer can be split into",
        )


def with_rows(packed: Packed, count: int) -> Packed:
    """``packed`` with rows of zeros below it, ``count`` in all."""
    rows, columns = packed.shape
    more = count - rows
    if not more:
        return packed
    # 4: the nibble of a group without values.
    codes = packed.codes.new_full((more, packed.codes.shape[1]), 0x44 if packed.layout == "packed24" else 0)
    values = packed.values
    if packed.layout != "bitmask":
        values = torch.cat([values, values.new_zeros(more, values.shape[1])])
    scales = packed.scales
    if scales is not None:
        scales = torch.cat([scales, scales.new_ones(more, scales.shape[1])])
    return replace(packed, shape=(count, columns), values=values, codes=torch.cat([packed.codes, codes]), scales=scales)
