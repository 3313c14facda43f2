"""Products of activations with packed and dense weights by the CPU kernels; in plain torch where there are none.

Each refuses what cannot be one product first (:mod:`sparsify.runtime.arguments`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparsify.runtime import reference
from sparsify.runtime.arguments import (
    check_24,
    check_bitmask,
    check_dense,
    check_experts_24,
    check_experts_bitmask,
    failure,
    wants_gradient,
)
from sparsify.runtime.cpu import native
from sparsify.runtime.cpu.asked_once import KnownCodes, KnownMatrices
from sparsify.runtime.cpu.unpacking import unpack_rows
from sparsify.runtime.cpu.wide import empty_product, multiplier, product, slow_dtypes
from sparsify.runtime.layout import padded

# Up to FEW tokens are multiplied with weights that stay packed, each by itself; up to MANY with four rows at a time
# unpacked inside the kernel; above, PANEL rows at a time are unpacked into a buffer that all panels share, for a dense
# product. packed24 with AVX-512 is never unpacked: above FEW_ACROSS tokens they lie across the vectors.
FEW_24, FEW_BITMASK, FEW_ACROSS = 16, 8, 14
MANY = 64
PANEL = 512

_codes, _matrices = KnownCodes(), KnownMatrices()


def linear_24(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = _matrices.rows(x, values, meta, None, bias)
    if rows < 0:
        rows = check_24(x, values, meta, bias)
        _codes.check(meta)
        _matrices.remember(values, meta, None, rows, values.shape[1] * 2)
    if native.library() is None:
        return reference.linear_24(x, values, meta, bias)
    return _linear(x, values, meta, None, rows, few_24(), bias)


def linear_bitmask(x: Tensor, values: Tensor, mask: Tensor, rowptr: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = _matrices.rows(x, values, mask, rowptr, bias)
    if rows < 0:
        rows = check_bitmask(x, values, mask, rowptr, bias)
        _matrices.remember(values, mask, rowptr, rows, mask.shape[1] * 32)
    if native.library() is None:
        return reference.linear_bitmask(x, values, mask, rowptr, bias)
    return _linear(x, values, mask, rowptr, rows, FEW_BITMASK, bias)


def experts_24(x: Tensor, values: Tensor, meta: Tensor, offsets: Tensor) -> Tensor:
    check_experts_24(x, values, meta, offsets)
    _codes.check(meta)
    if native.library() is None:
        return reference.experts_24(x, values, meta, offsets)
    rows = values.shape[1]
    return reference.by_expert(
        x, rows, offsets, lambda e, part: _linear(part, values[e], meta[e], None, rows, few_24(), None)
    )


def experts_bitmask(x: Tensor, values: Tensor, mask: Tensor, rowptr: Tensor, offsets: Tensor) -> Tensor:
    check_experts_bitmask(x, values, mask, rowptr, offsets)
    if native.library() is None:
        return reference.experts_bitmask(x, values, mask, rowptr, offsets)
    rows = mask.shape[1]
    values, rowptr = values.contiguous(), rowptr.contiguous()

    def product(expert: int, part: Tensor) -> Tensor:
        starts = rowptr[expert * rows : (expert + 1) * rows + 1]
        return _linear(part, values, mask[expert], starts, rows, FEW_BITMASK, None)

    return reference.by_expert(x, rows, offsets, product)


def linear_dense(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    check_dense(x, weight, bias)
    library = native.library()
    rows, columns = weight.shape
    if x.dtype in slow_dtypes() and x.numel() > columns and weight.dtype == x.dtype:
        return product(x, weight, bias)
    if wants_gradient(x, weight, bias):
        return linear(x, weight, bias)
    # One token: no more numbers than it has inputs.
    if library is None or x.numel() != columns or not columns or not weight.is_contiguous():
        return linear(x, weight, bias)
    kind, isa = native.KINDS.get(x.dtype), native.isa()
    if kind is None or isa == 0:
        return linear(x, weight, bias)
    x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = empty_product(x, [1] * (x.dim() - 1), rows)
    failed = library.linear_dense(
        isa,
        kind,
        weight.data_ptr(),
        weight.numel(),
        x.data_ptr(),
        x.numel(),
        0 if bias is None else bias.data_ptr(),
        -1 if bias is None else bias.numel(),
        y.data_ptr(),
        rows,
        columns,
        torch.get_num_threads(),
    )
    if failed:
        raise failure(failed, x, weight, weight)
    return y


def _linear(
    x: Tensor, values: Tensor, codes: Tensor, starts: Tensor | None, rows: int, few: int, bias: Tensor | None
) -> Tensor:
    """The product by the kernels. ``starts`` is None for packed24."""
    library = native.library()
    assert library is not None, "callers run only where there are kernels"
    x, values, codes = x.contiguous(), values.contiguous(), codes.contiguous()
    *lead, width = x.shape
    count = x.numel()
    if count > MANY * width and not (starts is None and native.any_number_24(x.dtype)):
        return _by_panels(x, values, codes, starts, rows, bias)
    bias = None if bias is None else bias.contiguous()
    starts = None if starts is None else starts.contiguous()
    y = empty_product(x, lead, rows)
    failed = library.linear(
        native.isa(),
        native.KINDS[x.dtype],
        values.data_ptr(),
        values.numel(),
        codes.data_ptr(),
        codes.nbytes,
        0 if starts is None else starts.data_ptr(),
        0 if starts is None else starts.numel(),
        x.data_ptr(),
        count,
        0 if bias is None else bias.data_ptr(),
        -1 if bias is None else bias.numel(),
        y.data_ptr(),
        rows,
        width,
        few,
        torch.get_num_threads(),
    )
    if failed:
        raise failure(failed, x, values, codes)
    return y


def few_24() -> int:
    return FEW_ACROSS if native.isa() == 2 else FEW_24


def _by_panels(
    x: Tensor, values: Tensor, codes: Tensor, starts: Tensor | None, rows: int, bias: Tensor | None
) -> Tensor:
    """The product with PANEL rows at a time unpacked: the memory of one panel, whatever the matrix."""
    width = x.shape[-1]
    columns, starts = padded(width), None if starts is None else starts.contiguous()
    x2 = x.reshape(-1, width)
    y = x.new_empty(x2.shape[0], rows)
    panel = values.new_empty(min(PANEL, rows), columns)
    multiply = multiplier(x2)
    for first in range(0, rows, PANEL):
        count = min(PANEL, rows - first)
        unpack_rows(values, codes, starts, panel, first, count)
        part = None if bias is None else bias[first : first + count]
        y[:, first : first + count] = multiply(panel[:count, :width], part)
    return y.view(*x.shape[:-1], rows)
