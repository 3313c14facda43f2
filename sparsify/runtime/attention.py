"""Attention of one token of each sequence, in plain torch; and what it is called with, refused where it is not that."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sparsify.errors import BackendError
from sparsify.runtime.layout import DTYPES

# Head widths are multiples of this: the longest vector of the kernels.
STEP = 16


def fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> bool:
    """Whether these are query [B, H, 1, D], key [B, G, L, D], value [B, G, L, E], of one dtype of float32, bfloat16 and
    float16, G dividing H, D and E multiples of STEP, and a mask of bools or floats that broadcasts to [B, H, 1, L].
    """
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4 or not query.dtype == key.dtype == value.dtype:
        return False
    sequences, heads, tokens, width = query.shape
    groups, positions = key.shape[1:3]
    if tokens != 1 or query.dtype not in DTYPES or not groups or not positions or heads % groups:
        return False
    if key.shape != (sequences, groups, positions, width) or value.shape[:3] != key.shape[:3]:
        return False
    if not width or width % STEP or not value.shape[3] or value.shape[3] % STEP:
        return False
    if mask is None:
        return True
    whole = (sequences, heads, 1, positions)
    known = mask.dtype is torch.bool or mask.dtype in DTYPES
    return known and mask.dim() == 4 and all(n in (1, m) for n, m in zip(mask.shape, whole, strict=True))


def check_attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> None:
    """Raises:
    BackendError: not what :func:`fits` wants.
    """
    if not fits(query, key, value, mask):
        shapes = [list(t.shape) for t in (query, key, value, *(() if mask is None else (mask,)))]
        raise BackendError(
            "attention of one token of each sequence",
            found=f"query, key, value and mask {', '.join(map(str, shapes))} of {query.dtype}",
            do="Give query [B, H, 1, D], key and value [B, G, L, D] and a mask that broadcasts to [B, H, 1, L], of one "
            f"dtype of 16 or 32 bits, D a multiple of {STEP}; torch's scaled_dot_product_attention takes others",
        )


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale · query keyᵀ + mask) value, [B, H, 1, E]."""
    if mask is not None and mask.dtype is not torch.bool:
        mask = mask.to(query.dtype)
    grouped = key.shape[1] != query.shape[1]
    return scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=grouped)


def fake_attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))
