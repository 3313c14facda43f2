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

import math
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.library import Library, register_fake
from torch.nn.functional import linear, pad

from sparsify.errors import BackendError
from sparsify.runtime.cuda import compressed as libraries
from sparsify.runtime.cuda import driver
from sparsify.runtime.cuda import variants as kernels
from sparsify.runtime.cuda.autotune import Weights
from sparsify.runtime.cuda.dispatch import Plan
from sparsify.runtime.cuda.fragments import DTYPES, TILE_BYTES, TILE_ROWS, from_fragments, tiles
from sparsify.runtime.cuda.variants import Arguments, Variant
from sparsify.runtime.layout import Packed, unpack

# Bytes of the dense copy of a part of W, for products that are better done dense.
WORKSPACE = 64 << 20
# Columns of x are read sixteen bytes at a time.
_UNIT = 8


def _cuda(
    x: Tensor, fragments: Tensor | None, compressed: Tensor | None, codes: Tensor | None, rows: int, plan: str,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    columns = x.shape[-1]
    held = fragments if fragments is not None else compressed
    if x.dtype not in DTYPES or held is None or (bias is not None and bias.dtype is not x.dtype):
        raise _mismatch(x, held, bias)
    tokens = x.numel() // columns
    if not tokens:
        return x.new_empty((*x.shape[:-1], rows))
    kernel = Plan.parse(plan).kernel(tokens)
    y = run(kernel, x.reshape(tokens, columns), fragments, compressed, codes, rows, bias)
    return y.view(*x.shape[:-1], rows)


def run(
    kernel: str, x: Tensor, fragments: Tensor | None, compressed: Tensor | None, codes: Tensor | None, rows: int,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``x`` [tokens, columns] through ``kernel``, a name of :mod:`sparsify.runtime.cuda.dispatch`: [tokens, rows],
    contiguous.
    """
    x = x.contiguous()
    if kernel.startswith(("cutlass", "cusparselt")):
        if compressed is None:
            raise _missing(kernel, "the compressed copy")
        algorithm = int(kernel.partition(":")[2] or 0)
        return libraries.multiply(x, compressed, codes, bias, algorithm).contiguous()
    if fragments is None:
        raise _missing(kernel, "fragments")
    if tuple(fragments.shape[:2]) != tiles(rows, x.shape[1]) or fragments.nbytes != math.prod(
        (*fragments.shape[:2], TILE_BYTES)
    ):
        raise BackendError(
            f"a 2:4 product of {x.shape[1]} columns with {rows} rows", found=f"fragments {list(fragments.shape)}",
            do="Give the fragments of a matrix of that shape",
        )  # fmt: skip
    if kernel == "unpack":
        return _unpacked_product(x, fragments, rows, bias)
    if x.shape[1] % _UNIT or x.data_ptr() % 16:
        # A copy on a boundary of sixteen bytes, with columns that W does not have.
        x = pad(x, (0, -x.shape[1] % _UNIT)).clone(memory_format=torch.contiguous_format)
    return _own_product(Variant.named(kernel), x, fragments, rows, bias)


def product(kernel: str, weights: Weights) -> Callable[[Tensor], Tensor]:
    """The call that runs ``kernel``, for :func:`sparsify.runtime.cuda.autotune.measure`."""
    rows = weights.dense.shape[0]
    return lambda x: run(kernel, x, weights.fragments, weights.compressed, weights.codes, rows)


def _own_product(variant: Variant, x: Tensor, fragments: Tensor, rows: int, bias: Tensor | None) -> Tensor:
    tokens, columns = x.shape
    module = _module(x)
    y = x.new_empty(tokens, rows)
    partial = x.new_empty((variant.splits, tokens, rows), dtype=torch.float32) if variant.splits > 1 else None
    bias = None if bias is None else bias.contiguous()
    arguments = Arguments(
        fragments.data_ptr(), x.data_ptr(), _pointer(bias), y.data_ptr(), _pointer(partial), tokens, rows, columns,
        fragments.shape[1], variant.splits, 0, 0,
    )  # fmt: skip
    module.launch(variant.launch(tokens, rows), arguments)
    if partial is not None:
        module.launch(kernels.add_splits(tokens, rows), arguments)
    return y


def _unpacked_product(x: Tensor, fragments: Tensor, rows: int, bias: Tensor | None) -> Tensor:
    """WORKSPACE bytes of W at a time made dense, and multiplied by cuBLAS."""
    tokens, columns = x.shape
    wide = -(-columns // _UNIT) * _UNIT
    step = max(TILE_ROWS, WORKSPACE // (2 * wide) // TILE_ROWS * TILE_ROWS)
    if rows <= step:
        return linear(x, dense_rows(fragments, x, 0, rows, wide)[:, :columns], bias)
    y = x.new_empty(tokens, rows)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        part = dense_rows(fragments, x, first, count, wide)[:, :columns]
        out = y[:, first : first + count]
        if bias is None:
            torch.mm(x, part.t(), out=out)
        else:
            torch.addmm(bias[first : first + count], x, part.t(), out=out)
    return y


def dense_rows(fragments: Tensor, like: Tensor, first: int, count: int, columns: int) -> Tensor:
    """Rows [first, first + count) of the weight, [count, columns] in the dtype of ``like``; ``first`` in sixteens."""
    out = like.new_empty(count, columns)
    arguments = Arguments(
        fragments.data_ptr(), None, None, out.data_ptr(), None, 0, 0, columns, fragments.shape[1], 1, first, count
    )
    _module(like).launch(kernels.unpack(count, columns), arguments)
    return out


def _module(x: Tensor) -> driver.Module:
    module = driver.module(x.dtype, x.device.index)
    if module is None:
        raise BackendError(
            "a 2:4 product on a GPU", found="no NVRTC library, which compiles the kernels",
            do="Install torch's CUDA build, or nvidia-cuda-nvrtc",
        )  # fmt: skip
    return module


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _reference(
    x: Tensor, fragments: Tensor | None, compressed: Tensor | None, codes: Tensor | None, rows: int, plan: str,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    Plan.parse(plan)
    shape = (rows, x.shape[-1])
    if fragments is not None:
        packed: Packed = from_fragments(fragments, x.dtype, *shape)
    elif compressed is not None and codes is not None:
        packed = libraries.decompress(compressed, codes, shape)
    else:
        raise _missing(plan, "fragments")
    return linear(x, unpack(packed), bias)


def _fake(
    x: Tensor, fragments: Tensor | None, compressed: Tensor | None, codes: Tensor | None, rows: int, plan: str,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], rows))


def _portable_cuda(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear_24`` where the weight was not prepared, or there is no NVRTC."""
    columns = x.shape[-1]
    tokens = x.numel() // columns
    same = x.dtype is values.dtype and (bias is None or bias.dtype is x.dtype)
    triton = _triton() if same and x.dtype in DTYPES else None
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


def _mismatch(x: Tensor, held: Tensor | None, bias: Tensor | None) -> BackendError:
    found = f"x of {x.dtype}" + ("" if bias is None else f", bias of {bias.dtype}")
    return BackendError(
        "a 2:4 product on a GPU", found=found if held is not None else "no copy of the weight",
        do="Give x and bias of one dtype, bfloat16 or float16",
    )  # fmt: skip


def _missing(kernel: str, what: str) -> BackendError:
    return BackendError(
        f"a 2:4 product by {kernel}", found=f"the weight has not {what} here", do="Prepare it under another policy"
    )


_library = Library("sparsify", "FRAGMENT")
_library.define(
    "linear_24_prepared(Tensor x, Tensor? fragments, Tensor? compressed, Tensor? codes, int rows, str plan, "
    "Tensor? bias=None) -> Tensor"
)
_library.impl("linear_24_prepared", _reference, "CompositeExplicitAutograd")
_library.impl("linear_24_prepared", _cuda, "CUDA")
register_fake("sparsify::linear_24_prepared", _fake, lib=_library)

linear_24_prepared = torch.ops.sparsify.linear_24_prepared.default


def register_portable(library: Library) -> None:
    """Give ``linear_24`` of ``library`` its CUDA implementation."""
    library.impl("linear_24", _portable_cuda, "CUDA")
