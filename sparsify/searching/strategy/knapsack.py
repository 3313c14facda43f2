"""Which parts to prune together, where each has a size and a cost and the costs are added; and costs that learn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

# Sizes are counted in so many units of the whole at most.
_UNITS = 4096


def cheapest_of_each_size(costs: Sequence[float], sizes: Sequence[int]) -> list[tuple[float, frozenset[int]]]:
    """For every size that parts can have together, their least cost and which they are; sizes rise.

    Sizes past 4096 units of their greatest common divisor are rounded, and so is what stands for one size.
    """
    unit = max(math.gcd(*sizes), -(-sum(sizes) // _UNITS))
    counts = [max(1, round(size / unit)) for size in sizes]
    least = np.full(sum(counts) + 1, np.inf)
    least[0] = 0.0
    taken = np.zeros((len(counts), len(least)), dtype=bool)
    for at, (cost, count) in enumerate(zip(costs, counts, strict=True)):
        with_it = least[:-count] + cost
        taken[at, count:] = with_it < least[count:]
        least[count:] = np.where(taken[at, count:], with_it, least[count:])
    found = []
    for size in np.flatnonzero(np.isfinite(least)):
        left, chosen = int(size), set[int]()
        for at in range(len(counts) - 1, -1, -1):
            if taken[at, left]:
                chosen.add(at)
                left -= counts[at]
        found.append((float(least[size]), frozenset(chosen)))
    return found


def learn(costs: list[float], chosen: Iterable[int], measured: float, much: float) -> None:
    """Let ``costs`` of the parts ``chosen`` sum to what was ``measured`` of them together; each is changed by its part
    in their sum.

    Args:
        much: by how much they are too low where what was measured is no number.
    """
    members = sorted(chosen)
    missing = measured - sum(costs[at] for at in members) if math.isfinite(measured) else much
    weights = {at: abs(costs[at]) + 1e-12 for at in members}
    whole = sum(weights.values())
    for at in members:
        costs[at] += missing * weights[at] / whole


def next_choice(
    costs: Sequence[float], sizes: Mapping[str, int], slack: float, more_than: int, tried: set[frozenset[str]]
) -> frozenset[str] | None:
    """The parts to try next: those with most weights that ``costs`` say are within ``slack``; where that is nowhere so,
    the cheapest. Only parts with ``more_than`` weights that were not tried; None where there are none.
    """
    names = list(sizes)
    best: tuple[bool, float, frozenset[str]] | None = None
    for cost, chosen in cheapest_of_each_size(costs, list(sizes.values())):
        parts = frozenset(names[at] for at in chosen)
        size = sum(sizes[name] for name in parts)
        if size <= more_than or parts in tried:
            continue
        within = cost <= slack
        worth = (within, size if within else -cost, parts)
        if best is None or worth[:2] > best[:2]:
            best = worth
    return None if best is None else best[2]
