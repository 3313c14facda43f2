"""The operators over packed weights in plain torch: what every device runs that has no kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from sparsify.runtime.arguments import ends_of
from sparsify.runtime.layout import Packed, unpack
from sparsify.runtime.words import Layout


def linear_24(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None) -> Tensor:
    return linear(x, unpack(Packed("packed24", (values.shape[0], x.shape[-1]), values, meta)), bias)


def linear_bitmask(x: Tensor, values: Tensor, mask: Tensor, rowptr: Tensor, bias: Tensor | None = None) -> Tensor:
    return linear(x, unpack(Packed("bitmask", (mask.shape[0], x.shape[-1]), values, mask)), bias)


def experts_24(x: Tensor, values: Tensor, meta: Tensor, offsets: Tensor) -> Tensor:
    return by_expert(x, values.shape[1], offsets, lambda e, rows: linear_24(rows, values[e], meta[e]))


def experts_bitmask(x: Tensor, values: Tensor, mask: Tensor, rowptr: Tensor, offsets: Tensor) -> Tensor:
    experts, rows = mask.shape[:2]
    full = unpack(Packed("bitmask", (experts * rows, x.shape[-1]), values, mask.flatten(0, 1))).view(experts, rows, -1)
    return by_expert(x, rows, offsets, lambda e, part: linear(part, full[e]))


def linear_24_few(
    x: Tensor,
    scales: Tensor,
    values: Tensor,
    meta: Tensor,
    bits: int,
    group: int,
    exact: bool,
    bias: Tensor | None = None,
) -> Tensor:
    return linear(x, unpack_few("packed24", scales, values, meta, bits, group, x.shape[-1]), bias)


def linear_bitmask_few(
    x: Tensor,
    scales: Tensor,
    values: Tensor,
    mask: Tensor,
    starts: Tensor,
    bits: int,
    group: int,
    exact: bool,
    bias: Tensor | None = None,
) -> Tensor:
    return linear(x, unpack_few("bitmask", scales, values, mask, bits, group, x.shape[-1]), bias)


def linear_dense_few(
    x: Tensor, scales: Tensor, values: Tensor, bits: int, group: int, exact: bool, bias: Tensor | None = None
) -> Tensor:
    return linear(x, unpack_few("dense", scales, values, None, bits, group, x.shape[-1]), bias)


def experts_24_few(
    x: Tensor, scales: Tensor, values: Tensor, meta: Tensor, bits: int, group: int, exact: bool, offsets: Tensor
) -> Tensor:
    def product(e: int, part: Tensor) -> Tensor:
        return linear_24_few(part, scales[e], values[e], meta[e], bits, group, exact)

    return by_expert(x, scales.shape[1], offsets, product)


def experts_bitmask_few(
    x: Tensor,
    scales: Tensor,
    values: Tensor,
    mask: Tensor,
    starts: Tensor,
    bits: int,
    group: int,
    exact: bool,
    offsets: Tensor,
) -> Tensor:
    experts, rows = scales.shape[:2]
    full = unpack_few("bitmask", scales.flatten(0, 1), values, mask.flatten(0, 1), bits, group, x.shape[-1])
    full = full.view(experts, rows, -1)
    return by_expert(x, rows, offsets, lambda e, part: linear(part, full[e]))


def experts_dense_few(
    x: Tensor, scales: Tensor, values: Tensor, bits: int, group: int, exact: bool, offsets: Tensor
) -> Tensor:
    def product(e: int, part: Tensor) -> Tensor:
        return linear_dense_few(part, scales[e], values[e], bits, group, exact)

    return by_expert(x, scales.shape[1], offsets, product)


def unpack_few(
    layout: Layout, scales: Tensor, values: Tensor, codes: Tensor | None, bits: int, group: int, width: int
) -> Tensor:
    """The matrix [rows, width] of ``scales`` times the integers of 8 or 4 bits that ``values`` holds. ``group`` 0: a
    scale for each row.
    """
    rows = scales.shape[0]
    coded = values.new_empty(rows, 0) if codes is None else codes
    return unpack(Packed(layout, (rows, width), values, coded, scales, bits, group or None))


def by_expert(x: Tensor, rows: int, offsets: Tensor, product: Callable[[int, Tensor], Tensor]) -> Tensor:
    """``product(e, tokens of expert e)``, put together. Tokens past the last offset belong to no expert: zeros."""
    y = x.new_zeros(x.shape[0], rows)
    start = 0
    for expert, end in enumerate(ends_of(offsets, x.shape[0])):
        if end > start:
            y[start:end] = product(expert, x[start:end])
        start = end
    return y


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale · query keyᵀ + mask) value, [B, H, 1, E]."""
    if mask is not None and mask.dtype is not torch.bool:
        mask = mask.to(query.dtype)
    grouped = key.shape[1] != query.shape[1]
    return scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=grouped)
