"""What the operators are called with: refused here, on every device, where the tensors cannot be those of one product.

Shapes, dtypes and dimensions are looked at in Python, which alone knows them; lengths, and all that lies in memory, by
the kernels (``cpu/kernels/kernels.cpp``). What holds after these checks: every tensor has as many numbers as the kernel
that is handed its address will read, and a code or a start that lies is found before it leads anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import BackendError
from sparsify.runtime.layout import DTYPES, UNIT

# Head widths are multiples of this: the longest vector of the kernels.
HEAD_STEP = 16
# What the kernels answer (``Answer`` in kernels.cpp); anything else: the sizes are not those of one product.
_MEMORY, _STARTS = 2, 3


def wants_gradient(*given: Any) -> bool:
    """Whether a gradient of one of the tensors among ``given`` is asked for."""
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in given)


def checked(check: Callable[..., Any], product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``product``, of ordinary tensors on one device that ``check`` lets pass."""

    def run(*given: Any) -> Tensor:
        check(*given)
        for tensor in given:
            if not isinstance(tensor, Tensor):
                continue
            if tensor.layout is not torch.strided:
                raise _place(f"a tensor whose layout is {tensor.layout}", "Give ordinary tensors: to_dense() makes one")
            if tensor.device != given[0].device:
                raise _place(f"tensors on {given[0].device} and {tensor.device}", "Bring all to one device")
        return product(*given)

    return run


def check_24(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None) -> int:
    """Refuse what is not x [..., width], values [rows, columns / 2], meta [rows, columns / 8], bias [rows].

    Returns:
        ``rows``.

    Raises:
        BackendError: it is not.
    """
    if x is None or values is None or meta is None:
        raise missing()
    dtype, kept = x.dtype, values.shape
    if dtype is not values.dtype or dtype not in DTYPES or meta.dtype is not torch.uint8:
        raise wrong_dtypes(x, values, meta, bias)
    # A scalar has no last dimension.
    width = x.shape[-1] if x.dim() else 0
    if len(kept) != 2 or not _fits(width, kept[1] * 2) or meta.shape != (kept[0], kept[1] // 4):
        raise disagreement(x, values, meta)
    if bias is not None and (bias.dtype is not dtype or bias.shape != kept[:1]):
        raise wrong_bias(x, bias, kept[0])
    return kept[0]


def check_bitmask(x: Tensor, values: Tensor, mask: Tensor, starts: Tensor, bias: Tensor | None = None) -> int:
    """Refuse what is not x [..., width], values [kept + PADDING], mask [rows, columns / 32], starts [rows + 1], bias
    [rows].

    Returns:
        ``rows``.

    Raises:
        BackendError: it is not.
    """
    if x is None or values is None or mask is None or starts is None:
        raise missing()
    dtype, coded = x.dtype, mask.shape
    if dtype is not values.dtype or dtype not in DTYPES or mask.dtype is not torch.int32:
        raise wrong_dtypes(x, values, mask, bias)
    width = x.shape[-1] if x.dim() else 0
    if len(coded) != 2 or not _fits(width, coded[1] * 32) or not are_kept(values, starts, coded[0]):
        raise disagreement(x, values, mask)
    if bias is not None and (bias.dtype is not dtype or bias.shape != coded[:1]):
        raise wrong_bias(x, bias, coded[0])
    return coded[0]


def check_experts_24(x: Tensor, values: Tensor, meta: Tensor, offsets: Tensor) -> None:
    """The same of stacks, [experts, rows, …], x [tokens, width] and offsets [experts].

    Raises:
        BackendError: it is not.
    """
    if x is None or values is None or meta is None:
        raise missing()
    dtype, kept = x.dtype, values.shape
    if dtype is not values.dtype or dtype not in DTYPES or meta.dtype is not torch.uint8:
        raise wrong_dtypes(x, values, meta, None)
    fits = len(kept) == 3 and x.dim() == 2 and _fits(x.shape[-1], kept[2] * 2)
    if not fits or meta.shape != (*kept[:2], kept[2] // 4):
        raise disagreement(x, values, meta)
    check_offsets(x, kept[0], offsets)


def check_experts_bitmask(x: Tensor, values: Tensor, mask: Tensor, starts: Tensor, offsets: Tensor) -> None:
    """The same of a stack, mask [experts, rows, columns / 32], starts [experts · rows + 1].

    Raises:
        BackendError: it is not.
    """
    if x is None or values is None or mask is None or starts is None:
        raise missing()
    dtype, coded = x.dtype, mask.shape
    if dtype is not values.dtype or dtype not in DTYPES or mask.dtype is not torch.int32:
        raise wrong_dtypes(x, values, mask, None)
    fits = len(coded) == 3 and x.dim() == 2 and _fits(x.shape[-1], coded[2] * 32)
    if not fits or not are_kept(values, starts, coded[0] * coded[1]):
        raise disagreement(x, values, mask)
    check_offsets(x, coded[0], offsets)


def check_dense(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Refuse what is not x [..., columns], weight [rows, columns], bias [rows], of one dtype.

    Raises:
        BackendError: it is not.
    """
    if x is None or weight is None:
        raise missing()
    if x.dtype is not weight.dtype or not x.dim() or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise BackendError(
            f"a product of x {list(x.shape)} of {x.dtype} with dense weights",
            found=f"weights {list(weight.shape)} of {weight.dtype}",
            do="Give x of as many inputs as the weights have, and of their dtype",
        )
    if bias is not None and (bias.dtype is not x.dtype or bias.shape != weight.shape[:1]):
        raise wrong_bias(x, bias, weight.shape[0])


def ends_of(offsets: Tensor, tokens: int) -> list[int]:
    """Where the tokens of each expert end.

    Raises:
        BackendError: they descend, or lie outside of the tokens.
    """
    ends: list[int] = offsets.tolist()
    if any(a > b for a, b in pairwise((0, *ends, tokens))):
        raise BackendError(
            f"a product of {tokens} tokens with stacked experts",
            found=f"offsets {ends[:8]}{' …' if len(ends) > 8 else ''}",
            do="Give the ends of each expert's tokens, ascending, and none past the last token",
        )
    return ends


def disagreement(x: Tensor, values: Tensor, codes: Tensor) -> BackendError:
    return BackendError(
        f"a product of x {list(x.shape)} with packed weights",
        found=f"values {list(values.shape)} and codes {list(codes.shape)} of {codes.dtype}: not one matrix for x",
        do="Give the tensors of one packed matrix, and x of its inputs",
    )


def failure(answer: int, x: Tensor, values: Tensor, codes: Tensor) -> BackendError:
    """What a kernel that did not answer 0 found."""
    if answer == _MEMORY:
        return BackendError(
            "a product with packed weights", found="not enough memory", do="Free some, or use fewer tokens"
        )
    if answer == _STARTS:
        return BackendError(
            f"a product of x {list(x.shape)} with packed weights",
            found=f"starts of the rows that do not count the bits of the mask, or go past the {values.numel()} values",
            do="Give the tensors of one packed matrix; row_starts counts the mask",
        )
    return disagreement(x, values, codes)


def _fits(width: int, columns: int) -> bool:
    """Whether inputs of ``width`` are those of a matrix whose ``columns`` are padded."""
    return columns % UNIT == 0 and columns - UNIT < width <= columns


def are_kept(values: Tensor, starts: Tensor, rows: int) -> bool:
    """Whether these may be the values of a bitmask and the starts of its rows."""
    return values.dim() == 1 and starts.dtype is torch.int64 and starts.shape == (rows + 1,)


def check_offsets(x: Tensor, experts: int, offsets: Tensor) -> None:
    if offsets is None:
        raise missing()
    if offsets.dtype not in (torch.int32, torch.int64) or offsets.shape != (experts,):
        raise BackendError(
            f"a product of x {list(x.shape)} with {experts} stacked experts",
            found=f"offsets {list(offsets.shape)} of {offsets.dtype}",
            do="Give the end of each expert's tokens, as int32 or int64",
        )


def wrong_dtypes(x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None) -> BackendError:
    found = f"x of {x.dtype}, weights of {values.dtype}, codes of {codes.dtype}"
    return BackendError(
        "a product with packed weights",
        found=found + ("" if bias is None else f", bias of {bias.dtype}"),
        do="Give all but the codes of one dtype: float32, bfloat16 or float16",
    )


def _place(found: str, do: str) -> BackendError:
    return BackendError("a product with packed weights", found=found, do=do)


def missing() -> BackendError:
    # Torch lets None pass for any tensor.
    return BackendError("a product", found="None in the place of a tensor", do="Give all but the bias")


def wrong_bias(x: Tensor, bias: Tensor, rows: int) -> BackendError:
    return BackendError(
        f"a product of x of {x.dtype} with weights of {rows} outputs",
        found=f"bias of {bias.dtype} {list(bias.shape)}",
        do=f"Give a bias [{rows}] of x's dtype",
    )


def is_one_token(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> bool:
    """Whether these are query [B, H, 1, D], key [B, G, L, D], value [B, G, L, E], of one dtype of float32, bfloat16 and
    float16, G dividing H, D and E multiples of HEAD_STEP; and a mask of bools or floats that broadcasts to
    [B, H, 1, L].
    """
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4 or not query.dtype == key.dtype == value.dtype:
        return False
    sequences, heads, tokens, width = query.shape
    groups, positions = key.shape[1:3]
    if tokens != 1 or query.dtype not in DTYPES or not groups or not positions or heads % groups:
        return False
    if key.shape != (sequences, groups, positions, width) or value.shape[:3] != key.shape[:3]:
        return False
    if not width or width % HEAD_STEP or not value.shape[3] or value.shape[3] % HEAD_STEP:
        return False
    if mask is None:
        return True
    whole = (sequences, heads, 1, positions)
    known = mask.dtype is torch.bool or mask.dtype in DTYPES
    return known and mask.dim() == 4 and all(n in (1, m) for n, m in zip(mask.shape, whole, strict=True))


def check_attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> None:
    """Raises:
    BackendError: not what :func:`is_one_token` wants.
    """
    if not is_one_token(query, key, value, mask):
        shapes = [list(t.shape) for t in (query, key, value, *(() if mask is None else (mask,)))]
        raise BackendError(
            "attention of one token of each sequence",
            found=f"query, key, value and mask {', '.join(map(str, shapes))} of {query.dtype}",
            do="Give query [B, H, 1, D], key and value [B, G, L, D] and a mask that broadcasts to [B, H, 1, L], of one "
            f"dtype of 16 or 32 bits, D a multiple of {HEAD_STEP}; torch's scaled_dot_product_attention takes others",
        )
