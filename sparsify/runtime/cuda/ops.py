"""What a graph calls on a GPU: ``torch.ops.sparsify.linear_24_prepared``, y = x Wᵀ + b with W in the layouts of this
device.

Any leading dimensions, any number of tokens, bias or none, bfloat16 or float16, for inference. The kernel is looked up
in the weight's plan by the number of tokens, on the host: nothing waits for the GPU, all memory comes from torch's
allocator, and launches go to the current stream, so that CUDA graphs capture it. Results do not depend on what ran
before: no sum is taken in an order that may vary. On other devices a plain reference serves, which takes fragments and
CUTLASS's copy.

Importing this also gives ``linear_24`` its CUDA implementation, for weights that are still in the portable layout.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.library import Library, fallthrough_kernel, register_fake
from torch.nn.functional import linear

from sparsify.runtime.arguments import check_24
from sparsify.runtime.cuda import compressed as libraries
from sparsify.runtime.cuda.arguments import check_one_device, check_prepared
from sparsify.runtime.cuda.dispatch import Plan
from sparsify.runtime.cuda.fragments import DTYPES
from sparsify.runtime.cuda.integers import unpack_fragments
from sparsify.runtime.cuda.products import missing, run_kernel
from sparsify.runtime.layout import Packed, unpack
from sparsify.runtime.reference import differentiable, linear_24


def _cuda(
    x: Tensor,
    fragments: Tensor | None,
    compressed: Tensor | None,
    codes: Tensor | None,
    rows: int,
    plan: str,
    bias: Tensor | None = None,
) -> Tensor:
    check_prepared(x, fragments, compressed, codes, rows, plan, bias)
    columns = x.shape[-1]
    tokens = x.numel() // columns
    if not tokens:
        return x.new_empty((*x.shape[:-1], rows))
    kernel = Plan.parse(plan).kernel(tokens)
    y = run_kernel(kernel, x.reshape(tokens, columns), fragments, compressed, codes, rows, bias)
    return y.view(*x.shape[:-1], rows)


def _reference(
    x: Tensor,
    fragments: Tensor | None,
    compressed: Tensor | None,
    codes: Tensor | None,
    rows: int,
    plan: str,
    bias: Tensor | None = None,
) -> Tensor:
    check_prepared(x, fragments, compressed, codes, rows, plan, bias)
    shape = (rows, x.shape[-1])
    if fragments is not None:
        packed = unpack_fragments(fragments, x.dtype, *shape)
    elif compressed is not None and codes is not None:
        packed = libraries.decompress(compressed, codes, shape)
    else:
        raise missing(plan, "fragments")
    return linear(x, unpack(packed), bias)


def _fake(
    x: Tensor,
    fragments: Tensor | None,
    compressed: Tensor | None,
    codes: Tensor | None,
    rows: int,
    plan: str,
    bias: Tensor | None = None,
) -> Tensor:
    check_prepared(x, fragments, compressed, codes, rows, plan, bias)
    return x.new_empty((*x.shape[:-1], rows))


def _portable_cuda(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear_24`` where the weight was not prepared, or there is no NVRTC."""
    check_24(x, values, meta, bias)
    check_one_device(x, values, meta, bias)
    columns = x.shape[-1]
    tokens = x.numel() // columns
    triton = _triton() if x.dtype in DTYPES else None
    if triton is not None and 0 < tokens <= triton.MOST_TOKENS:
        y: Tensor = triton.linear(x.reshape(tokens, columns), values, meta, bias)
        return y.view(*x.shape[:-1], values.shape[0])
    return linear(x, unpack(Packed("packed24", (values.shape[0], columns), values, meta)), bias)


@cache
def _triton() -> ModuleType | None:
    """Our Triton kernels, where Triton is installed."""
    try:
        from sparsify.runtime.cuda import triton_kernels
    except ImportError:
        return None
    return triton_kernels


_library = Library("sparsify", "FRAGMENT")
_library.define(
    "linear_24_prepared(Tensor x, Tensor? fragments, Tensor? compressed, Tensor? codes, int rows, str plan, "
    "Tensor? bias=None) -> Tensor"
)
_library.impl("linear_24_prepared", _reference, "CompositeExplicitAutograd")
_library.impl("linear_24_prepared", differentiable(_cuda, _reference), "CUDA")
_library.impl("linear_24_prepared", fallthrough_kernel, "Autograd")
register_fake("sparsify::linear_24_prepared", _fake, lib=_library)

linear_24_prepared: OpOverload[..., Tensor] = torch.ops.sparsify.linear_24_prepared.default


def register_portable(library: Library) -> None:
    """Give ``linear_24`` of ``library`` its CUDA implementation."""
    library.impl("linear_24", differentiable(_portable_cuda, linear_24), "CUDA")
