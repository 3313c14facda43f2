"""The operators over packed weights in plain torch: what every device runs that has no kernels, and whose gradients all
have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, scaled_dot_product_attention

from sparsify.errors import BackendError
from sparsify.runtime.arguments import ends_of, wants_gradient
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


def differentiable(run: Callable[..., Tensor], plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``run``, a product of x with constant weights, with the gradients of ``plain``, which is the same in torch: of x
    and of a bias that is its last argument. Weights are made dense when a gradient is asked for, and not kept.

    Of products whose inputs are rounded to 8 bits the gradient is that of the same without rounding. For what is
    registered as an operator whose autograd key falls through: nothing is asked where gradients are off.

    Raises:
        BackendError: (when it is called) the weights' own gradient is wanted.
    """

    def product(*given: Any) -> Tensor:
        if not wants_gradient(*given):
            return run(*given)
        # What follows the weights is a bias, or holds no floating-point numbers.
        if wants_gradient(*given[1:-1]):
            raise BackendError(
                "a product with packed weights",
                found="weights whose own gradient is asked for",
                do="Packed weights cannot be trained: dequantize() the model, or `sparsify unpack` the folder",
            )
        y: Tensor = _Differentiable.apply(run, plain, *given)
        return y

    return product


class _Differentiable(torch.autograd.Function):
    """See :func:`differentiable`."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], plain: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
        ctx.plain, ctx.rest, ctx.shape = plain, rest, x.shape
        return run(x, *rest)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        of_x = of_last = None
        if ctx.needs_input_grad[2]:
            # The same at any x, for the product is linear.
            x = gradient.new_zeros(ctx.shape).requires_grad_()
            with torch.enable_grad():
                y = ctx.plain(x, *(t.detach() if isinstance(t, Tensor) else t for t in ctx.rest))
            (of_x,) = torch.autograd.grad(y, x, gradient)
        if ctx.needs_input_grad[-1]:
            of_last = gradient.reshape(-1, gradient.shape[-1]).sum(0)
        return None, None, of_x, *[None] * (len(ctx.rest) - 1), of_last
