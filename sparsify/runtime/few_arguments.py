"""What the operators over values of 8 and 4 bits are called with, refused here where it cannot be one product, as
:mod:`sparsify.runtime.arguments` does it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.errors import BackendError
from sparsify.runtime.arguments import are_kept, check_offsets, disagreement, missing, wrong_bias, wrong_dtypes
from sparsify.runtime.few_bits import groups, padded
from sparsify.runtime.layout import DTYPES

# How values are stored by their bits, and the columns that may share a scale (0: a whole row).
VALUES = {8: torch.int8, 4: torch.uint8}
GROUPS = (0, 32, 64, 128)


def check_24_few(
    x: Tensor,
    scales: Tensor,
    values: Tensor,
    meta: Tensor,
    bits: int,
    group: int,
    exact: bool,
    bias: Tensor | None = None,
) -> None:
    """Refuse what is not x [..., width], scales [rows, groups], values [rows, bytes], meta [rows, columns / 8], bias
    [rows], with ``columns`` the width, padded, and the bytes of half of them.

    Raises:
        BackendError: it is not.
    """
    _check_few(x, scales, values, meta, bits, group, torch.uint8)
    _check_rows(x, scales, bias, 2)
    rows, columns = scales.shape[0], padded(x.shape[-1])
    if values.shape != (rows, columns // 2 * bits // 8) or meta.shape != (rows, columns // 8):
        raise disagreement(x, values, meta)


def check_bitmask_few(
    x: Tensor,
    scales: Tensor,
    values: Tensor,
    mask: Tensor,
    starts: Tensor,
    bits: int,
    group: int,
    exact: bool,
    bias: Tensor | None = None,
) -> None:
    """The same with values [bytes + PADDING], mask [rows, columns / 32], starts [rows + 1].

    Raises:
        BackendError: it is not.
    """
    if starts is None:
        raise missing()
    _check_few(x, scales, values, mask, bits, group, torch.int32)
    _check_rows(x, scales, bias, 2)
    rows, columns = scales.shape[0], padded(x.shape[-1])
    if mask.shape != (rows, columns // 32) or not are_kept(values, starts, rows):
        raise disagreement(x, values, mask)


def check_dense_few(
    x: Tensor, scales: Tensor, values: Tensor, bits: int, group: int, exact: bool, bias: Tensor | None = None
) -> None:
    """The same with values of all columns, and no codes.

    Raises:
        BackendError: it is not.
    """
    _check_few(x, scales, values, None, bits, group, None)
    _check_rows(x, scales, bias, 2)
    if values.shape != (scales.shape[0], padded(x.shape[-1]) * bits // 8):
        raise disagreement(x, values, values)


def check_experts_24_few(
    x: Tensor, scales: Tensor, values: Tensor, meta: Tensor, bits: int, group: int, exact: bool, offsets: Tensor
) -> None:
    """The same of stacks, [experts, rows, …], x [tokens, width] and offsets [experts].

    Raises:
        BackendError: it is not.
    """
    _check_few(x, scales, values, meta, bits, group, torch.uint8)
    _check_rows(x, scales, None, 3)
    stack, columns = scales.shape[:2], padded(x.shape[-1])
    if values.shape != (*stack, columns // 2 * bits // 8) or meta.shape != (*stack, columns // 8):
        raise disagreement(x, values, meta)
    check_offsets(x, stack[0], offsets)


def check_experts_bitmask_few(
    x: Tensor,
    scales: Tensor,
    values: Tensor,
    mask: Tensor,
    starts: Tensor,
    bits: int,
    group: int,
    exact: bool,
    offsets: Tensor,
) -> None:
    """The same of a stack, mask [experts, rows, columns / 32], starts [experts · rows + 1].

    Raises:
        BackendError: it is not.
    """
    if starts is None:
        raise missing()
    _check_few(x, scales, values, mask, bits, group, torch.int32)
    _check_rows(x, scales, None, 3)
    stack = scales.shape[:2]
    if mask.shape != (*stack, padded(x.shape[-1]) // 32) or not are_kept(values, starts, stack[0] * stack[1]):
        raise disagreement(x, values, mask)
    check_offsets(x, stack[0], offsets)


def check_experts_dense_few(
    x: Tensor, scales: Tensor, values: Tensor, bits: int, group: int, exact: bool, offsets: Tensor
) -> None:
    """The same of a stack, values [experts, rows, bytes].

    Raises:
        BackendError: it is not.
    """
    _check_few(x, scales, values, None, bits, group, None)
    _check_rows(x, scales, None, 3)
    if values.shape != (*scales.shape[:2], padded(x.shape[-1]) * bits // 8):
        raise disagreement(x, values, values)
    check_offsets(x, scales.shape[0], offsets)


def _check_few(
    x: Tensor,
    scales: Tensor,
    values: Tensor,
    codes: Tensor | None,
    bits: int,
    group: int,
    coded: torch.dtype | None,
) -> None:
    """What is asked of every product with values of few bits; ``coded`` None: of one without codes."""
    if x is None or scales is None or values is None or (coded is not None and codes is None):
        raise missing()
    if bits not in VALUES or group not in GROUPS:
        raise BackendError(
            "a product with packed weights of few bits",
            found=f"{bits} bits, a scale for every {group} columns",
            do=f"Give {' or '.join(map(str, VALUES))} bits and a group of {', '.join(map(str, GROUPS))} (0: the row)",
        )
    if x.dtype is not scales.dtype or x.dtype not in DTYPES or values.dtype is not VALUES[bits]:
        raise _few_dtypes(x, scales, values, bits)
    if codes is not None and codes.dtype is not coded:
        raise wrong_dtypes(x, scales, codes, None)
    # A scalar has no last dimension.
    if not x.dim() or not x.shape[-1] or not scales.dim() or scales.shape[-1] != groups(x.shape[-1], group or None):
        raise BackendError(
            f"a product of x {list(x.shape)} with packed weights of a scale for every {group or 'row’s'} columns",
            found=f"scales {list(scales.shape)}",
            do="Give the tensors of one packed matrix, and x of its inputs",
        )


def _check_rows(x: Tensor, scales: Tensor, bias: Tensor | None, dimensions: int) -> None:
    """Of one matrix (two dimensions) or a stack of them."""
    if scales.dim() != dimensions or (dimensions == 3 and x.dim() != 2):
        raise disagreement(x, scales, scales)
    if bias is not None and (bias.dtype is not x.dtype or bias.shape != scales.shape[:1]):
        raise wrong_bias(x, bias, scales.shape[0])


def _few_dtypes(x: Tensor, scales: Tensor, values: Tensor, bits: int) -> BackendError:
    return BackendError(
        f"a product with packed weights of {bits} bits",
        found=f"x of {x.dtype}, scales of {scales.dtype}, values of {values.dtype}",
        do=f"Give values of {VALUES[bits]}, and x and scales of one of float32, bfloat16 and float16",
    )
