"""In which order settings are tried. A setting says which share of each part goes; a trial gives its loss.

Percentages: all kinds alike first, by bisection; then, around the best found so far, each kind alone a step down and a
step up, and along the way that these measurements say costs least for each weight, all kinds together; twice, the
second time by smaller steps. Patterns: all parts, then each alone, then the cheapest together, and from there
moves by a few parts that are predicted to fit; the prediction learns from each.
In all at most 8 trials with all kinds alike, and 8 more for each kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from sparsify.searching.strategy.bracket import highest
from sparsify.searching.strategy.moves import Moves
from sparsify.searching.strategy.separable import Curve, allocations, cheapest_first

# Trials of one question: a bisection, or one kind.
MOST = 8
# Percentages are multiples of 1/GRID.
GRID = 200
# How far a kind is moved alone, and how far all are from where they were then, in 1/GRID.
_STEPS = ((30, 60), (10, 20))
# The loss of a setting, less what the budget allows. The words say what is tried.
Point = TypeVar("Point", int, str)
Excess = Callable[[Mapping[str, int], str], float]


@dataclass
class _Seen:
    """The best of the settings that were within the budget."""

    sizes: Mapping[str, int]
    best: dict[str, int] | None = None
    losses: dict[tuple[int, ...], float] = field(default_factory=dict)

    def weights(self, levels: Mapping[str, int]) -> int:
        return sum(self.sizes[kind] * level for kind, level in levels.items())

    def take(self, levels: Mapping[str, int], excess: float) -> None:
        self.losses[tuple(levels.values())] = excess
        if excess <= 0 and (self.best is None or self.weights(levels) > self.weights(self.best)):
            self.best = dict(levels)


def most_trials(parts: int, fixed: bool) -> int:
    """How many trials there can be: of ``parts`` that are pruned or not (``fixed``), or of kinds with percentages."""
    if fixed:
        return 1 if parts < 2 else 1 + parts + MOST + MOST
    return MOST if parts < 2 else MOST + len(_STEPS) * (2 * parts + min(MOST, 2 * parts))


def by_percentages(excess: Excess, sizes: Mapping[str, int], dense: float) -> dict[str, int] | None:
    """Levels of all kinds, in 1/:data:`GRID`, the sparsest within the budget of those tried; None where none was.

    Args:
        excess: of a setting with a level for each kind, 0 for one that stays dense. dense: its value where all do.
        sizes: how many weights each kind has.
    """
    seen = _Seen(sizes, losses={(0,) * len(sizes): dense})

    def trial(levels: Mapping[str, int], words: str) -> float:
        found = excess(levels, words)
        seen.take(levels, found)
        return found

    highest(lambda level: trial(dict.fromkeys(sizes, level), "all kinds alike"), 0, GRID, MOST, GRID // 2)
    if len(sizes) < 2:
        return seen.best
    for step, reach in _STEPS:
        base = seen.best or dict.fromkeys(sizes, 0)
        curves = _curves(trial, seen, base, step)
        bounds = {kind: (max(0, level - reach), min(GRID - 1, level + reach)) for kind, level in base.items()}
        better = [levels for levels in allocations(curves, sizes, bounds) if seen.weights(levels) > seen.weights(base)]
        most = min(MOST, 2 * len(sizes))
        # So many that halving finds the last: 2**most - 1.
        chosen = better[:: -(-len(better) // ((1 << most) - 1))] if better else []

        def along(at: int, way: Sequence[dict[str, int]] = chosen) -> float:
            return trial(way[at], "all kinds, each its own")

        # Near where it begins, which is within the budget: the measured slopes are those of there.
        highest(along, -1, len(chosen), most, len(chosen) // 8)
    return seen.best


def _curves(trial: Excess, seen: _Seen, base: Mapping[str, int], step: int) -> dict[str, Curve]:
    """What each kind's level costs around ``base``."""
    curves = {}
    for kind, level in base.items():
        points = {level: seen.losses[tuple(base.values())]}
        for moved in (level - step, level + step) if level else (step, 2 * step):
            if (moved := min(max(moved, 0), GRID - 1)) not in points:
                points[moved] = trial({**base, kind: moved}, f"{kind} alone")
        curves[kind] = Curve.through(_finite(points))
    return curves


def _finite(points: Mapping[Point, float]) -> dict[Point, float]:
    """The same with a loss that is large in the place of one that is no number."""
    known = [value for value in points.values() if value < float("inf")]
    most = 10 + max(known, default=0)
    return {point: min(value, most) for point, value in points.items()}


def by_parts(excess: Excess, sizes: Mapping[str, int], dense: float) -> set[str] | None:
    """The parts to prune, of those tried within the budget the ones with most weights; None where none was.

    Args:
        excess: of a setting with 1 for each part that is pruned and 0 for the others. dense: its value for none.
    """
    seen, names = _Seen(sizes), list(sizes)

    def trial(chosen: Iterable[str], words: str) -> float:
        chosen = frozenset(chosen)
        levels = {name: int(name in chosen) for name in names}
        found = excess(levels, words)
        seen.take(levels, found)
        return found

    if trial(names, "all of them") > 0 and len(names) > 1:
        alone = {name: trial([name], f"{name} alone") - dense for name in names}
        costs = _finite(alone)
        order = [names[at] for at in cheapest_first([costs[name] for name in names], list(sizes.values()))]
        moves = Moves(sizes, costs, -dense, {frozenset([name]): loss for name, loss in alone.items()})

        def together(count: int) -> float:
            found = trial(order[:count], f"the cheapest {count} together")
            moves.losses[frozenset(order[:count])] = found - dense
            return found

        highest(together, 1, len(order), MOST)
        for _ in range(MOST):
            best = frozenset(name for name in names if seen.best and seen.best[name])
            chosen = moves.following(best)
            if chosen is None:
                break
            moves.learn(best, chosen, trial(chosen, f"{len(chosen)} together") - dense)
    return None if seen.best is None else {name for name, level in seen.best.items() if level}
