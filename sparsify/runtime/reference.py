"""The operators over packed weights in plain torch: what every device runs that has no kernels."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import linear

from sparsify.runtime.arguments import ends_of
from sparsify.runtime.layout import Packed, unpack


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


def by_expert(x: Tensor, rows: int, offsets: Tensor, product: Callable[[int, Tensor], Tensor]) -> Tensor:
    """``product(e, tokens of expert e)``, put together. Tokens past the last offset belong to no expert: zeros."""
    y = x.new_zeros(x.shape[0], rows)
    start = 0
    for expert, end in enumerate(ends_of(offsets, x.shape[0])):
        if end > start:
            y[start:end] = product(expert, x[start:end])
        start = end
    return y
