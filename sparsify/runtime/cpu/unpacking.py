"""Packed matrices made dense by the CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.runtime.cpu import native
from sparsify.runtime.cpu.arguments import failure
from sparsify.runtime.layout import Packed, unpack


def unpack_rows(values: Tensor, codes: Tensor, rowptr: Tensor | None, out: Tensor, first: int, count: int) -> None:
    """Rows [first, first + count) of a matrix into ``out``; ``rowptr`` is None for packed24."""
    library = native.library()
    assert library is not None, "callers run only where there are kernels"
    meta, mask = (codes.data_ptr(), 0) if rowptr is None else (0, codes.data_ptr())
    failed = library.unpack(
        native.isa(),
        values.element_size(),
        values.data_ptr(),
        meta,
        mask,
        0 if rowptr is None else rowptr.data_ptr(),
        out.data_ptr(),
        first,
        count,
        out.shape[1],
        torch.get_num_threads(),
    )
    if failed:
        raise failure(failed, out, values, codes)


def unpacked(packed: Packed, rowptr: Tensor | None = None) -> Tensor:
    """:func:`unpack` by the kernels where they are: the same bits, sooner.

    Args:
        rowptr: ``row_starts`` of a bitmask, needed for one.
    """
    rows, columns = packed.shape
    on_cpu = packed.values.device.type == "cpu"
    if not on_cpu or native.library() is None or (packed.layout == "bitmask" and rowptr is None):
        return unpack(packed)
    full = packed.codes.shape[1] * (8 if packed.layout == "packed24" else 32)
    out = packed.values.new_empty(rows, full)
    unpack_rows(packed.values.contiguous(), packed.codes.contiguous(), rowptr, out, 0, rows)
    return out[:, :columns].contiguous()
