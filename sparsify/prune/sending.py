"""Parts of a weight in few bytes: where most of a pruned part follows from the dense one, only the rest is sent.

What is unpacked is what was packed, to the bit, signs of zeros among it: nothing is assumed of a pass, each part is
looked at.

``mask``   one bit a number, where it was the dense one's and is +0 now; all others are as they were.
``zeros``  one bit a number, where it is +0, and the others whole.
``whole``  every number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from sparsify.runtime.codes import pack_bits, unpack_bits
from sparsify.tensors import as_whole_numbers, zeroed

Form = Literal["mask", "zeros", "whole"]
# The least bytes first; a part that has one form has all that follow.
FORMS: tuple[Form, ...] = ("mask", "zeros", "whole")


def form_of(part: Tensor, dense: Tensor) -> Form:
    """The form of ``part`` that takes least; ``dense`` is what it was, of the same shape and dtype."""
    now, before = as_whole_numbers(part), as_whole_numbers(dense)
    zeros = now == 0
    if bool((zeros | (now == before)).all()):
        return "mask"
    left = part.numel() - int(zeros.sum())
    return "zeros" if left * part.element_size() + part.numel() / 8 < part.numel() * part.element_size() else "whole"


def packed(part: Tensor, form: Form) -> list[Tensor]:
    """``part`` in the ``form`` that all agreed on: one or two tensors of one dimension; :func:`unpacked` reads them."""
    if form == "whole":
        return [part.reshape(-1)]
    now = as_whole_numbers(part).reshape(-1)
    bits = pack_bits(now == 0)
    return [bits] if form == "mask" else [bits, now[now != 0]]


def unpacked(dense: Tensor, form: Form, take: Callable[[int, torch.dtype], Tensor]) -> Tensor:
    """The part that was packed; ``dense`` is what it was.

    Args:
        take: gives the next of the packed tensors, of so many numbers of a dtype.
    """
    if form == "whole":
        return take(dense.numel(), dense.dtype).view(dense.shape)
    zeros = unpack_bits(take(-(-dense.numel() // 8), torch.uint8))[: dense.numel()].view(dense.shape)
    if form == "mask":
        return zeroed(dense, zeros)
    found = torch.zeros_like(as_whole_numbers(dense))
    found[~zeros] = take(dense.numel() - int(zeros.sum()), found.dtype)
    return found.view(dense.dtype)
