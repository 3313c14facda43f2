"""Packed matrices made dense by the CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.runtime.arguments import disagreement, failure
from sparsify.runtime.cpu import native
from sparsify.runtime.cpu.few import unpack_few
from sparsify.runtime.layout import DTYPES, Packed, unpack


def unpack_rows(values: Tensor, codes: Tensor, starts: Tensor | None, out: Tensor, first: int, count: int) -> None:
    """Rows [first, first + count) of a matrix into ``out``; ``starts`` is None for packed24. All are contiguous.

    Raises:
        BackendError: they are not the tensors of one matrix.
    """
    library = native.library()
    assert library is not None, "callers run only where there are kernels"
    failed = library.unpack(
        native.isa(),
        values.element_size(),
        values.data_ptr(),
        values.numel(),
        codes.data_ptr(),
        codes.nbytes,
        0 if starts is None else starts.data_ptr(),
        0 if starts is None else starts.numel(),
        out.data_ptr(),
        out.numel(),
        codes.shape[0],
        out.shape[1],
        first,
        count,
        torch.get_num_threads(),
    )
    if failed:
        raise failure(failed, out, values, codes)


def unpacked(packed: Packed, rowptr: Tensor | None = None) -> Tensor:
    """:func:`unpack` by the kernels where they are: the same bits, sooner.

    Args:
        rowptr: ``row_starts`` of a bitmask, needed for one.

    Raises:
        BackendError: the tensors are not those of one matrix.
    """
    rows, columns = packed.shape
    by_kernels = packed.values.device.type == "cpu" and native.library() is not None
    by_kernels = by_kernels and (packed.layout != "bitmask" or rowptr is not None)
    if packed.scales is not None and packed.bits is not None:
        if not by_kernels:
            return unpack(packed)
        codes, group = None if packed.layout == "dense" else packed.codes, packed.group or 0
        return unpack_few(packed.layout, packed.scales, packed.values, codes, rowptr, packed.bits, group, columns)
    starts = rowptr if packed.layout == "bitmask" else None
    coded, dims = (torch.uint8, 2) if packed.layout == "packed24" else (torch.int32, 1)
    sound = packed.values.layout is packed.codes.layout is torch.strided and packed.values.dtype in DTYPES
    sound = sound and packed.codes.dtype is coded and packed.codes.dim() == 2 and packed.values.dim() == dims
    if not sound or packed.codes.shape[0] != rows or (starts is not None and not _are_starts(starts)):
        raise disagreement(packed.values, packed.values, packed.codes)
    if not by_kernels:
        return unpack(packed)
    full = packed.codes.shape[1] * (8 if packed.layout == "packed24" else 32)
    out = packed.values.new_empty(rows, full)
    starts = None if starts is None else starts.contiguous()
    unpack_rows(packed.values.contiguous(), packed.codes.contiguous(), starts, out, 0, rows)
    return out[:, :columns].contiguous()


def _are_starts(starts: Tensor) -> bool:
    return starts.dtype is torch.int64 and starts.layout is torch.strided and starts.device.type == "cpu"
