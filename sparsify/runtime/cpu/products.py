"""Products of activations with packed and dense weights by the CPU kernels; in plain torch where there are none."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparsify.runtime import reference
from sparsify.runtime.cpu import native
from sparsify.runtime.cpu.arguments import disagreement, dtype_code, failure, pointer
from sparsify.runtime.cpu.unpacking import unpack_rows

# Up to FEW tokens are multiplied with weights that stay packed; up to MANY with four rows at a time unpacked inside the
# kernel; above, PANEL rows at a time are unpacked into a buffer that all panels share, for a dense product.
FEW_24, FEW_BITMASK = 16, 8
MANY = 64
PANEL = 512


def linear_24(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None) -> Tensor:
    library = native.library()
    if library is None:
        return reference.linear_24(x, values, meta, bias)
    rows, columns, width = values.shape[0], values.shape[1] * 2, x.shape[-1]
    kind = dtype_code(x, values, bias)
    if meta.shape[0] != rows or meta.shape[1] * 8 != columns or meta.dtype is not torch.uint8:
        raise disagreement(x, values, meta)
    values, meta, x = values.contiguous(), meta.contiguous(), x.contiguous()
    tokens = x.numel() // width
    if tokens > MANY:
        return _by_panels(x, values, meta, None, rows, columns, bias)
    y = x.new_empty((*x.shape[:-1], rows))
    failed = library.linear_24(
        native.isa(),
        kind,
        values.data_ptr(),
        meta.data_ptr(),
        x.data_ptr(),
        pointer(bias),
        y.data_ptr(),
        tokens,
        rows,
        width,
        columns,
        FEW_24,
        torch.get_num_threads(),
    )
    if failed:
        raise failure(failed, x, values, meta)
    return y


def linear_bitmask(x: Tensor, values: Tensor, mask: Tensor, rowptr: Tensor, bias: Tensor | None = None) -> Tensor:
    library = native.library()
    if library is None:
        return reference.linear_bitmask(x, values, mask, rowptr, bias)
    rows, columns, width = mask.shape[0], mask.shape[1] * 32, x.shape[-1]
    kind = dtype_code(x, values, bias)
    if mask.dtype is not torch.int32 or rowptr.dtype is not torch.int64 or rowptr.numel() != rows + 1:
        raise disagreement(x, values, mask)
    values, mask, rowptr, x = values.contiguous(), mask.contiguous(), rowptr.contiguous(), x.contiguous()
    tokens = x.numel() // width
    if tokens > MANY:
        return _by_panels(x, values, mask, rowptr, rows, columns, bias)
    y = x.new_empty((*x.shape[:-1], rows))
    failed = library.linear_bitmask(
        native.isa(),
        kind,
        values.data_ptr(),
        values.numel(),
        mask.data_ptr(),
        rowptr.data_ptr(),
        x.data_ptr(),
        pointer(bias),
        y.data_ptr(),
        tokens,
        rows,
        width,
        columns,
        FEW_BITMASK,
        torch.get_num_threads(),
    )
    if failed:
        raise failure(failed, x, values, mask)
    return y


def experts_24(x: Tensor, values: Tensor, meta: Tensor, offsets: Tensor) -> Tensor:
    return reference.by_expert(x, values.shape[1], offsets, lambda e, rows: linear_24(rows, values[e], meta[e]))


def experts_bitmask(x: Tensor, values: Tensor, mask: Tensor, rowptr: Tensor, offsets: Tensor) -> Tensor:
    if native.library() is None:
        return reference.experts_bitmask(x, values, mask, rowptr, offsets)
    rows = mask.shape[1]

    def product(expert: int, part: Tensor) -> Tensor:
        return linear_bitmask(part, values, mask[expert], rowptr[expert * rows : (expert + 1) * rows + 1])

    return reference.by_expert(x, rows, offsets, product)


def linear_dense(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    library = native.library()
    columns = weight.shape[1]
    if library is None or x.numel() != columns or x.dtype not in native.KINDS or not weight.is_contiguous():
        return linear(x, weight, bias)
    kind, isa = dtype_code(x, weight, bias), native.isa()
    if isa == 0:
        return linear(x, weight, bias)
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    failed = library.linear_dense(
        isa,
        kind,
        weight.data_ptr(),
        x.data_ptr(),
        pointer(bias),
        y.data_ptr(),
        weight.shape[0],
        columns,
        torch.get_num_threads(),
    )
    if failed:
        raise failure(failed, x, weight, weight)
    return y


def _by_panels(
    x: Tensor, values: Tensor, codes: Tensor, rowptr: Tensor | None, rows: int, columns: int, bias: Tensor | None
) -> Tensor:
    """The product with PANEL rows at a time unpacked: the memory of one panel, whatever the matrix."""
    width = x.shape[-1]
    if not columns - 64 < width <= columns:
        raise disagreement(x, values, codes)
    x2 = x.reshape(-1, width)
    y = x.new_empty(x2.shape[0], rows)
    panel = values.new_empty(min(PANEL, rows), columns)
    for first in range(0, rows, PANEL):
        count = min(PANEL, rows - first)
        unpack_rows(values, codes, rowptr, panel, first, count)
        part = None if bias is None else bias[first : first + count]
        y[:, first : first + count] = linear(x2, panel[:count, :width], part)
    return y.view(*x.shape[:-1], rows)
