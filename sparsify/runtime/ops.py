"""The operators that a lowered graph calls, ``torch.ops.sparsify.*``:

- ``linear_24``, ``linear_bitmask``: y = x Wᵀ + b with W packed (:mod:`sparsify.runtime.layout`);
- ``experts_24``, ``experts_bitmask``: the same for a stack of W, tokens sorted by expert, as ``grouped_mm`` does it;
- ``linear_24_few``, ``linear_bitmask_few``, ``linear_dense_few`` and ``experts_…_few``: the same with W as integers of
  8 or 4 bits, and a scale for each ``group`` columns of a row (0: for the row). ``exact`` leaves x floating; else CPUs
  make it int8 too where there are few tokens;
- ``linear_dense``: a dense product whose case of one token runs our own kernel;
- ``attend``: attention of one token of each sequence (:mod:`sparsify.runtime.cpu.attending`).

Any leading dimensions, any number of tokens, bias or none, for inference: gradients reach inputs and biases, and the
weights of ``linear_dense`` alone. On CPUs they run the kernels of :mod:`sparsify.runtime.cpu`; on every other device a
plain reference.
They are defined by schema and not by ``custom_op``, which costs some ten microseconds a call. On GPUs ``linear_24``
runs what :mod:`sparsify.runtime.cuda.ops` registers, and weights that were prepared for a GPU run that module's
``linear_24_prepared``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.library import Library, fallthrough_kernel, register_fake
from torch.nn.functional import linear

from sparsify.runtime import arguments, few_arguments, reference
from sparsify.runtime.arguments import checked
from sparsify.runtime.cpu import attending, few, products
from sparsify.runtime.cuda.ops import register_portable
from sparsify.runtime.reference import differentiable

_Product = Callable[..., Tensor]


def _fake_24(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], values.shape[0]))


def _fake_bitmask(x: Tensor, values: Tensor, mask: Tensor, rowptr: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], mask.shape[0]))


def _fake_experts_24(x: Tensor, values: Tensor, meta: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], values.shape[1])


def _fake_experts_bitmask(x: Tensor, values: Tensor, mask: Tensor, rowptr: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], mask.shape[1])


def _fake_dense(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_few(x: Tensor, scales: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], scales.shape[-2]))


def _fake_attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))


# Operators are torch's own registry; this object only keeps them alive.
_library = Library("sparsify", "DEF")


def _define(
    schema: str, check: Callable[..., Any], plain: _Product, on_cpu: _Product, fake: _Product, *, constant: bool = True
) -> OpOverload[..., Tensor]:
    """The operator of ``schema``: what refuses wrong arguments, what runs on any device, on CPUs (which checks what it
    is given itself), and in tracing.

    Args:
        constant: its weights are, and ``on_cpu`` knows of no gradient; else it sees to that itself.
    """
    name = schema.partition("(")[0]
    _library.define(f"{schema} -> Tensor")
    _library.impl(name, checked(check, plain), "CompositeExplicitAutograd")
    _library.impl(name, differentiable(on_cpu, plain) if constant else on_cpu, "CPU")
    # torch's way to register a gradient costs 5 microseconds a call where none is asked for; this way costs nothing.
    _library.impl(name, fallthrough_kernel, "Autograd")
    register_fake(f"sparsify::{name}", checked(check, fake), lib=_library)
    operator: OpOverload[..., Tensor] = getattr(torch.ops.sparsify, name).default
    return operator


linear_24 = _define(
    "linear_24(Tensor x, Tensor values, Tensor meta, Tensor? bias=None)",
    arguments.check_24,
    reference.linear_24,
    products.linear_24,
    _fake_24,
)
linear_bitmask = _define(
    "linear_bitmask(Tensor x, Tensor values, Tensor mask, Tensor rowptr, Tensor? bias=None)",
    arguments.check_bitmask,
    reference.linear_bitmask,
    products.linear_bitmask,
    _fake_bitmask,
)
experts_24 = _define(
    "experts_24(Tensor x, Tensor values, Tensor meta, Tensor offsets)",
    arguments.check_experts_24,
    reference.experts_24,
    products.experts_24,
    _fake_experts_24,
)
experts_bitmask = _define(
    "experts_bitmask(Tensor x, Tensor values, Tensor mask, Tensor rowptr, Tensor offsets)",
    arguments.check_experts_bitmask,
    reference.experts_bitmask,
    products.experts_bitmask,
    _fake_experts_bitmask,
)
linear_dense = _define(
    "linear_dense(Tensor x, Tensor weight, Tensor? bias=None)",
    arguments.check_dense,
    linear,
    products.linear_dense,
    _fake_dense,
    constant=False,
)
attend = _define(
    "attend(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale)",
    arguments.check_attend,
    reference.attend,
    attending.attend,
    _fake_attend,
    constant=False,
)
_FEW = "int bits, int group, bool exact"
_MASK = "Tensor values, Tensor mask, Tensor starts"
linear_24_few = _define(
    f"linear_24_few(Tensor x, Tensor scales, Tensor values, Tensor meta, {_FEW}, Tensor? bias=None)",
    few_arguments.check_24_few,
    reference.linear_24_few,
    few.linear_24_few,
    _fake_few,
)
linear_bitmask_few = _define(
    f"linear_bitmask_few(Tensor x, Tensor scales, {_MASK}, {_FEW}, Tensor? bias=None)",
    few_arguments.check_bitmask_few,
    reference.linear_bitmask_few,
    few.linear_bitmask_few,
    _fake_few,
)
linear_dense_few = _define(
    f"linear_dense_few(Tensor x, Tensor scales, Tensor values, {_FEW}, Tensor? bias=None)",
    few_arguments.check_dense_few,
    reference.linear_dense_few,
    few.linear_dense_few,
    _fake_few,
)
experts_24_few = _define(
    f"experts_24_few(Tensor x, Tensor scales, Tensor values, Tensor meta, {_FEW}, Tensor offsets)",
    few_arguments.check_experts_24_few,
    reference.experts_24_few,
    few.experts_24_few,
    _fake_few,
)
experts_bitmask_few = _define(
    f"experts_bitmask_few(Tensor x, Tensor scales, {_MASK}, {_FEW}, Tensor offsets)",
    few_arguments.check_experts_bitmask_few,
    reference.experts_bitmask_few,
    few.experts_bitmask_few,
    _fake_few,
)
experts_dense_few = _define(
    f"experts_dense_few(Tensor x, Tensor scales, Tensor values, {_FEW}, Tensor offsets)",
    few_arguments.check_experts_dense_few,
    reference.experts_dense_few,
    few.experts_dense_few,
    _fake_few,
)
register_portable(_library)
