"""For which numbers of tokens a dense copy of a packed weight is the faster one: measured, and asked at every product.

What is measured is few numbers: the *turns* at which the faster one changes, packed first. Of ``(4, 6)`` four and five
tokens go through the dense copy, fewer and more through the packed weight; of ``()`` none does.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from sparsify.runtime.cpu.stopwatch import FASTER, Stopwatch

# The numbers of tokens that are measured; one between two is taken for the one below it.
COUNTS = (1, 2, 3, 4, 6, 8, 16, 32, 64, 256)
# From so many on a product takes long, and varies little.
_LONG, _FEWER = 64, 3

Product = Callable[[Tensor], Tensor]


def dense_is_faster(turns: Sequence[int], tokens: int) -> bool:
    return bisect_right(turns, tokens) % 2 == 1


def measure_turns(packed: Product, dense: Product, columns: int, dtype: torch.dtype, watch: Stopwatch) -> list[int]:
    """Race both at each of COUNTS.

    Args:
        packed, dense: products with [tokens, columns].
    """
    turns: list[int] = []
    for tokens in COUNTS:
        x = torch.randn(tokens, columns).to(dtype)
        more = {"rounds": _FEWER} if tokens >= _LONG else {}
        ours, theirs = watch.race([partial(packed, x), partial(dense, x)], **more)
        if (theirs < FASTER * ours) != dense_is_faster(turns, tokens):
            turns.append(tokens)
    return turns


def are_turns(found: object) -> bool:
    """Whether these can have been measured: so much is asked of what comes from a file."""
    return (
        isinstance(found, list)
        and all(type(count) is int and count in COUNTS for count in found)
        and sorted(set(found)) == found
    )


def in_words(turns: Sequence[int]) -> str:
    """``4 to 5 tokens and from 64 tokens on``."""
    ranges = []
    for first, last in zip(turns[::2], [*turns[1::2], None], strict=False):
        if last is None:
            ranges.append(f"from {first} {_tokens(first)} on")
        else:
            ranges.append(f"{first} {_tokens(first)}" if last == first + 1 else f"{first} to {last - 1} tokens")
    return " and ".join(ranges) or "no number of tokens"


def _tokens(count: int) -> str:
    return "token" if count == 1 else "tokens"
