"""Products with a weight that was prepared for a GPU, each by the kernel that is named."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from sparsify.errors import BackendError
from sparsify.runtime.cuda import compressed as libraries
from sparsify.runtime.cuda import driver, variants
from sparsify.runtime.cuda.fragments import TILE_ROWS, tiles
from sparsify.runtime.cuda.integers import grid_in, is_tile
from sparsify.runtime.cuda.variants import Arguments, Variant

# Bytes of the dense copy of a part of W, for products that are better done dense.
WORKSPACE = 64 << 20
# Columns of x are read sixteen bytes at a time.
_UNIT = 8


def run_kernel(
    kernel: str,
    x: Tensor,
    fragments: Tensor | None,
    compressed: Tensor | None,
    codes: Tensor | None,
    rows: int,
    bias: Tensor | None = None,
) -> Tensor:
    """``x`` [tokens, columns] through ``kernel``, a name of :mod:`sparsify.runtime.cuda.dispatch`: [tokens, rows],
    contiguous.
    """
    x = x.contiguous()
    if kernel.startswith(("cutlass", "cusparselt")):
        if compressed is None:
            raise missing(kernel, "the compressed copy")
        algorithm = libraries.Algorithm.parse(kernel.partition(":")[2] or "0")
        y = libraries.multiply(x, compressed, codes, bias, algorithm).contiguous()
        if y.shape != (x.shape[0], rows):
            raise BackendError(
                f"a 2:4 product by {kernel}",
                found=f"a compressed copy of {y.shape[-1]} rows where {rows} were asked for",
                do="Give the copy of a matrix of that shape",
            )
        return y
    if fragments is None:
        raise missing(kernel, "fragments")
    whole = is_tile(fragments.shape[-1] * fragments.element_size())
    if fragments.dim() != 3 or tuple(fragments.shape[:2]) != tiles(rows, x.shape[1]) or not whole:
        raise BackendError(
            f"a 2:4 product of {x.shape[1]} columns with {rows} rows",
            found=f"fragments {list(fragments.shape)}",
            do="Give the fragments of a matrix of that shape",
        )
    if kernel == "unpack":
        return _unpacked_product(x, fragments, rows, bias)
    if x.shape[1] % _UNIT or x.data_ptr() % 16:
        # A copy on a boundary of sixteen bytes, with columns that W does not have.
        x = pad(x, (0, -x.shape[1] % _UNIT)).clone(memory_format=torch.contiguous_format)
    variant = Variant.named(kernel)
    if variant.grid != (grid := grid_in(fragments)):
        raise BackendError(
            f"a 2:4 product by {kernel}",
            found=f"weights of {'full width' if grid is None else grid.kind}",
            do="Give the plan that was prepared with the weight",
        )
    if variant.most_tokens is not None and x.shape[0] > variant.most_tokens:
        # The others would be left as they lay in memory.
        raise BackendError(
            f"a 2:4 product by {kernel}",
            found=f"{x.shape[0]} tokens, and it takes {variant.most_tokens}",
            do="Give a plan whose limits are those of its kernels",
        )
    return _own_product(variant, x, fragments, rows, bias)


def _own_product(variant: Variant, x: Tensor, fragments: Tensor, rows: int, bias: Tensor | None) -> Tensor:
    tokens, columns = x.shape
    module = _module(x)
    y = x.new_empty(tokens, rows)
    # Clusters add their sums in shared memory.
    partial = None
    if variant.kind == "tiled" and variant.splits > 1:
        partial = x.new_empty((variant.splits, tokens, rows), dtype=torch.float32)
    bias = None if bias is None else bias.contiguous()
    arguments = Arguments(
        fragments.data_ptr(),
        x.data_ptr(),
        _pointer(bias),
        y.data_ptr(),
        _pointer(partial),
        tokens,
        rows,
        columns,
        fragments.shape[1],
        variant.splits,
        int(variant.early),
        0,
        0,
    )
    module.launch(variant.launch(tokens, rows, module.multiprocessors), arguments)
    if partial is not None:
        module.launch(variants.add_splits_launch(tokens, rows, variant.early), arguments)
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
    out, grid = like.new_empty(count, columns), grid_in(fragments)
    place = (fragments.data_ptr(), None, None, out.data_ptr(), None, 0, 0, columns, fragments.shape[1], 1, 0)
    arguments = Arguments(*place, first, count, 0 if grid is None else grid.scales)
    _module(like).launch(variants.unpack_launch(count, columns, grid), arguments)
    return out


def _module(x: Tensor) -> driver.Module:
    module = driver.module(x.dtype, x.device.index)
    if module is None:
        raise BackendError(
            "a 2:4 product on a GPU",
            found="no NVRTC library, which compiles the kernels",
            do="Install torch's CUDA build, or nvidia-cuda-nvrtc",
        )
    return module


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def missing(kernel: str, what: str) -> BackendError:
    return BackendError(
        f"a 2:4 product by {kernel}", found=f"the weight has not {what} here", do="Prepare it under another policy"
    )
