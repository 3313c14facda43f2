"""Attention of one token of each sequence by the CPU kernels; in plain torch where there are none.

torch takes a matrix product for each head, which for one query of 16 bits is some 13 microseconds for 64 positions:
with 32 heads and 4096 positions as long as the products with all dense weights of Llama-3-8B's layer.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sparsify.errors import BackendError
from sparsify.runtime import arguments, reference
from sparsify.runtime.cpu import native

_BOOLS = 3
_Strides = ctypes.c_int64 * 11


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    arguments.check_attend(query, key, value, mask, scale)
    library = native.library()
    # torch's, where a gradient is asked for.
    if library is None or arguments.wants_gradient(query, key, value, mask):
        return reference.attend(query, key, value, mask, scale)
    query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
    sequences, heads, _, width = query.shape
    groups, positions, value_width = key.shape[1], key.shape[2], value.shape[3]
    mask_at, kind = None, _BOOLS
    over: tuple[int, ...] = (0, 0, 0)
    if mask is not None:
        mask_at, kind = mask.data_ptr(), native.KINDS.get(mask.dtype, _BOOLS)
        # One that serves all is not moved along.
        over = tuple(0 if mask.shape[i] == 1 else mask.stride(i) for i in (0, 1, 3))
    of = [query.stride(0), query.stride(1), *key.stride()[:3], *value.stride()[:3], *over]
    y = query.new_empty((sequences, heads, 1, value_width))
    failed = library.attend(
        native.isa(),
        native.KINDS[query.dtype],
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        mask_at,
        kind,
        _Strides(*of),
        sequences,
        groups,
        heads // groups,
        positions,
        width,
        value_width,
        scale,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    if failed:
        raise BackendError(
            f"attention of one token, key {list(key.shape)}", found="not enough memory", do="Free some: it takes little"
        )
    return y
