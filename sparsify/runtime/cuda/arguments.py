"""What the operators on a GPU are called with: refused where a kernel would read or write outside of its tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.errors import BackendError
from sparsify.runtime.cuda.dispatch import Plan
from sparsify.runtime.cuda.fragments import DTYPES, tiles
from sparsify.runtime.cuda.integers import is_tile

# Sizes are C's int in the kernels' arguments.
_MOST = 1 << 31


def check_prepared(
    x: Tensor,
    fragments: Tensor | None,
    compressed: Tensor | None,
    codes: Tensor | None,
    rows: int,
    plan: str,
    bias: Tensor | None = None,
) -> None:
    """Refuse what is not x [..., columns], copies of one matrix [rows, columns], bias [rows], of one 16-bit dtype.

    Raises:
        BackendError: it is not, or ``plan`` is none.
    """
    Plan.parse(plan)
    held = fragments if fragments is not None else compressed
    if held is None or x.dtype not in DTYPES or (bias is not None and bias.dtype is not x.dtype):
        found = f"x of {x.dtype}" + ("" if bias is None else f", bias of {bias.dtype}")
        raise _refusal(
            x,
            found if held is not None else "no copy of the weight",
            "Give x and bias of one dtype, bfloat16 or float16",
        )
    if not x.dim() or not 0 < x.shape[-1] < _MOST or not 0 < rows < _MOST:
        raise _refusal(x, f"{rows} rows", "Give x [..., columns], and the rows of the matrix")
    if bias is not None and bias.shape != (rows,):
        raise _refusal(x, f"bias {list(bias.shape)} for {rows} rows", f"Give a bias [{rows}]")
    check_one_device(x, fragments, compressed, codes, bias)
    columns = x.shape[-1]
    if fragments is not None:
        size = fragments.element_size()
        sound = size <= 2 and fragments.is_contiguous() and fragments.dim() == 3
        if not sound or fragments.shape[:2] != tiles(rows, columns) or not is_tile(fragments.shape[2] * size):
            raise _refusal(
                x,
                f"fragments {list(fragments.shape)} of {fragments.dtype} for {rows} rows of {columns} columns",
                "Give the fragments of a matrix of that shape",
            )
    if compressed is not None and not (compressed.dtype is x.dtype and compressed.is_contiguous()):
        raise _refusal(x, f"a compressed copy of {compressed.dtype}", "Give the copy that was prepared for x's dtype")
    if codes is not None and compressed is not None:
        # CUTLASS's: packed24's values, and its codes in words of 16 bits.
        sound = codes.dtype is torch.int16 and codes.is_contiguous() and columns % 16 == 0
        if not sound or compressed.shape != (rows, columns // 2) or codes.shape != (rows, columns // 16):
            raise _refusal(
                x,
                f"values {list(compressed.shape)} and codes {list(codes.shape)} of {codes.dtype}",
                "Give the copy and the codes of one matrix",
            )


def check_one_device(x: Tensor, *others: Tensor | None) -> None:
    """Refuse tensors that lie on several devices.

    Raises:
        BackendError: they do.
    """
    for other in others:
        if other is not None and other.device != x.device:
            raise _refusal(x, f"x on {x.device}, a tensor of the weight on {other.device}", "Bring all to one device")


def _refusal(x: Tensor, found: str, do: str) -> BackendError:
    return BackendError(f"a 2:4 product of x {list(x.shape)} on a GPU", found=found, do=do)
