"""Where zeros cost least, by one curve of loss for each kind of layer: the curves are added.

Around a point at which all kinds were measured together, each kind's percentage is moved alone and the loss measured.
What the loss grows by is taken to be the sum of what each kind alone makes it grow by.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Curve:
    """How steeply the loss of one kind grows with its level: ``slopes`` at ``places``, which rise, and so do they."""

    places: tuple[float, ...]
    slopes: tuple[float, ...]

    @classmethod
    def through(cls, points: Mapping[int, float]) -> Curve:
        """Of the loss at two levels or more. Where the loss falls, or grows ever slower, neighbours share a slope."""
        levels = sorted(points)
        pools: list[tuple[float, int, int]] = []
        for left, right in zip(levels, levels[1:], strict=False):
            pools.append((max(0.0, points[right] - points[left]), right - left, 1))
            while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
                rise, length, count = pools.pop()
                before = pools.pop()
                pools.append((before[0] + rise, before[1] + length, before[2] + count))
        slopes = [rise / length for rise, length, count in pools for _ in range(count)]
        return cls(tuple((a + b) / 2 for a, b in zip(levels, levels[1:], strict=False)), tuple(slopes))

    def slope(self, level: float) -> float:
        """Between the places and beyond them along straight lines, and never below zero."""
        if len(self.places) == 1:
            return self.slopes[0]
        i = min(max(bisect_right(self.places, level) - 1, 0), len(self.places) - 2)
        share = (level - self.places[i]) / (self.places[i + 1] - self.places[i])
        return max(0.0, self.slopes[i] + share * (self.slopes[i + 1] - self.slopes[i]))


def allocations(
    curves: Mapping[str, Curve], sizes: Mapping[str, int], bounds: Mapping[str, tuple[int, int]]
) -> list[dict[str, int]]:
    """Levels for every kind, from their lowest bounds to their highest: one step of one kind at a time, always the
    step that adds least loss for each weight that it takes out.
    """
    levels = {kind: low for kind, (low, _) in bounds.items()}
    found = [dict(levels)]
    while True:
        steps = [
            (curves[kind].slope(level + 0.5) / sizes[kind], level, kind)
            for kind, level in levels.items()
            if level < bounds[kind][1]
        ]
        if not steps:
            return found
        levels[min(steps)[2]] += 1
        found.append(dict(levels))


def cheapest_first(costs: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """Indices by cost for each weight, the least first; of equals the larger, then the earlier."""
    return sorted(range(len(costs)), key=lambda i: (costs[i] / sizes[i], -sizes[i], i))
