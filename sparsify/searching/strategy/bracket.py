"""The largest number that holds, of a test that costs much and mostly holds below some point and fails above it."""

from __future__ import annotations

import math
from collections.abc import Callable

# How far into the bracket a guess by interpolation lies from its ends at least.
_MARGIN = 0.1


def highest(excess: Callable[[int], float], low: int, high: int, most: int, first: int | None = None) -> int | None:
    """The largest number between ``low`` and ``high``, both left out, at which ``excess`` was seen to be at most 0.

    Where ``excess`` never falls, that is the largest at which it is, unless ``most`` calls were too few: 2**most
    numbers never are. Where it falls somewhere, it is one at which it was measured all the same. The bracket is cut
    where a straight line between its ends says, as long as enough calls are left to go on by halves.

    Args:
        excess: by how much the budget is overdrawn; infinity counts as very much.
        first: the number to look at first. most: calls of ``excess``.

    Returns:
        None where none was found.
    """
    found: int | None = None
    below: float | None = None
    above: float | None = None
    for left in range(most - 1, -1, -1):
        if high - low < 2:
            break
        guess = (low + high) // 2
        if first is not None and low < first < high:
            guess, first = first, None
        elif below is not None and above is not None and math.isfinite(above) and above > below:
            share = min(max(below / (below - above), _MARGIN), 1 - _MARGIN)
            straight = min(max(low + round((high - low) * share), low + 1), high - 1)
            # Whichever side is left, what remains must be within reach of halving.
            if max(straight - low, high - straight) <= 1 << left:
                guess = straight
        value = excess(guess)
        if value <= 0:
            low, below, found = guess, value, guess
        else:
            high, above = guess, value
    return found
