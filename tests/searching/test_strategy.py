"""The order of trials, on losses that are formulas: within the budget, few trials, near the best there is."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.searching.strategy.moves import Moves
from sparsify.searching.strategy.rounds import GRID, by_parts, by_percentages
from sparsify.searching.strategy.separable import Curve, allocations, cheapest_first


class Asked:
    """A loss that keeps what is asked of it."""

    def __init__(self, loss: object, budget: float) -> None:
        self.loss, self.budget, self.settings = loss, budget, list[dict[str, int]]()

    def __call__(self, levels: Mapping[str, int], words: str) -> float:
        assert words
        self.settings.append(dict(levels))
        return self.loss(levels) - self.budget  # type: ignore[operator,no-any-return]

    def within(self, levels: Mapping[str, int]) -> bool:
        return bool(self.loss(levels) <= self.budget)  # type: ignore[operator]


rates = st.lists(st.tuples(st.floats(0.05, 5), st.floats(2, 9), st.integers(1, 40)), min_size=1, max_size=6)


def grown(kinds: Mapping[str, tuple[float, float, int]], coupling: float = 0.0) -> object:
    """A loss as pruning makes it: every kind's grows ever faster, and all together somewhat more than their sum."""

    def loss(levels: Mapping[str, int]) -> float:
        total = sum(a * math.expm1(b * levels[k] / GRID) / math.expm1(b) for k, (a, b, _) in kinds.items())
        return total + coupling * total * total

    return loss


@given(rates, st.floats(0.01, 1), st.floats(0, 0.5))
@settings(max_examples=60, deadline=None)
def test_percentages_are_within_the_budget_and_no_worse_than_all_alike(
    made: list[tuple[float, float, int]], budget: float, coupling: float
) -> None:
    kinds = {f"k{number}": own for number, own in enumerate(made)}
    sizes = {kind: size for kind, (_, _, size) in kinds.items()}
    asked = Asked(grown(kinds, coupling), budget)
    found = by_percentages(asked, sizes, -budget)
    assert len(asked.settings) <= 8 + 8 * len(sizes)
    alike = [level for level in range(1, GRID) if asked.within(dict.fromkeys(sizes, level))]
    assert (found is not None) == any(asked.within(levels) for levels in asked.settings)
    if found is not None:
        assert asked.within(found) and found in asked.settings
        weights = sum(sizes[kind] * level for kind, level in found.items())
        assert weights >= max(alike, default=0) * sum(sizes.values())


@pytest.mark.first(1)
@pytest.mark.parametrize("coupling", [0.0, 0.3])
def test_percentages_are_near_the_best_of_a_full_sweep(coupling: float) -> None:
    kinds = {"qkv": (0.2, 5.0, 3), "o": (0.3, 4.0, 2), "up": (0.9, 6.0, 8), "down": (2.0, 7.0, 4)}
    sizes = {kind: size for kind, (_, _, size) in kinds.items()}
    asked = Asked(grown(kinds, coupling), 0.1)
    found = by_percentages(asked, sizes, -0.1)
    assert found is not None

    def share(levels: Mapping[str, int]) -> float:
        return sum(sizes[k] * level for k, level in levels.items()) / sum(sizes.values()) / GRID

    sweep = (dict(zip(sizes, levels, strict=True)) for levels in itertools.product(range(0, GRID, 8), repeat=4))
    best = max(share(levels) for levels in sweep if asked.within(levels))
    assert share(found) >= 0.98 * best


@given(st.lists(st.floats(-1, 1), min_size=40, max_size=40), st.integers(1, 4))
def test_losses_that_go_up_and_down_give_what_was_measured_or_nothing(noise: list[float], count: int) -> None:
    sizes = {f"k{number}": number + 1 for number in range(count)}
    asked = Asked(lambda levels: noise[sum(levels.values()) % len(noise)], 0.0)
    found = by_percentages(asked, sizes, 0.0)
    held = [levels for levels in asked.settings if asked.within(levels)]
    assert len(asked.settings) <= 8 + 8 * count
    assert (found is None) == (not held) and (found is None or found in held)


def test_a_model_that_breaks_at_once_keeps_one_kind_to_prune() -> None:
    """All kinds alike never hold, not at half a percent; one of them alone does."""
    asked = Asked(lambda levels: math.inf if levels["glass"] else levels["clay"] / GRID, 0.4)
    assert by_percentages(asked, {"glass": 1, "clay": 1}, -0.4) is not None
    nothing = Asked(lambda levels: math.inf if any(levels.values()) else 0.0, 0.4)
    assert by_percentages(nothing, {"glass": 1, "clay": 1}, -0.4) is None


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 9)), min_size=1, max_size=24), st.floats(0, 6))
def test_parts_are_within_the_budget_and_the_best_where_costs_add_up(
    parts: list[tuple[float, int]], budget: float
) -> None:
    costs = {f"p{number}": cost for number, (cost, _) in enumerate(parts)}
    sizes = {f"p{number}": size for number, (_, size) in enumerate(parts)}
    asked = Asked(lambda levels: sum(costs[name] for name, level in levels.items() if level), budget)
    found = by_parts(asked, sizes, -budget)
    assert len(asked.settings) <= 1 + len(parts) + 16
    held = [levels for levels in asked.settings if asked.within(levels)]
    if found is None:
        assert not held
        return
    assert asked.within({name: int(name in found) for name in sizes})
    if sum(costs.values()) <= budget:
        assert found == set(sizes) and len(asked.settings) == 1
    # By weights no less than the cheapest that fit one after the other.
    order, spent, taken = cheapest_first(list(costs.values()), list(sizes.values())), 0.0, 0
    for at in order:
        spent += costs[f"p{at}"]
        if spent > budget * (1 - 1e-6) - 1e-6:
            break
        taken += sizes[f"p{at}"]
    assert sum(sizes[name] for name in found) >= taken


@given(
    st.lists(st.tuples(st.floats(0.01, 1), st.integers(1, 9)), min_size=2, max_size=8),
    st.floats(0.05, 2),
    st.floats(-0.4, 0.8),
    st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_parts_that_help_or_hurt_each_other_are_learned(
    parts: list[tuple[float, int]], budget: float, coupling: float, seed: int
) -> None:
    """Of some hundred choices one is found that is near the best, whatever pairs add or take away."""
    names, draw = [f"p{number}" for number in range(len(parts))], random.Random(seed)
    pairs = {(a, b): coupling * draw.random() for a, b in itertools.combinations(names, 2)}
    sizes = {name: size for name, (_, size) in zip(names, parts, strict=True)}
    own = {name: cost for name, (cost, _) in zip(names, parts, strict=True)}

    def loss(levels: Mapping[str, int]) -> float:
        chosen = [name for name in names if levels[name]]
        both = (pairs[a, b] * min(own[a], own[b]) for a, b in itertools.combinations(chosen, 2))
        return sum(own[name] for name in chosen) + sum(both)

    asked = Asked(loss, budget)
    found = by_parts(asked, sizes, -budget)
    every = (dict(zip(names, bits, strict=True)) for bits in itertools.product((0, 1), repeat=len(names)))
    best = max((sum(sizes[n] for n in names if s[n]) for s in every if asked.within(s) and any(s.values())), default=0)
    weights = sum(sizes[name] for name in found or ())
    assert weights <= best and (found is not None) == (best > 0)
    assert weights >= best - max(sizes.values())


def test_moves_take_in_most_that_is_predicted_to_fit() -> None:
    moves = Moves({"a": 1, "b": 2, "c": 4}, {"a": 0.1, "b": 0.3, "c": 0.9}, 1.0, {frozenset("a"): 0.1})
    assert moves.following(frozenset("a")) == {"a", "c"}
    moves.learn(frozenset("a"), frozenset("ac"), 1.4)
    assert moves.costs["c"] == pytest.approx(1.1), "half of what it was more than predicted"
    assert moves.following(frozenset("a")) == {"a", "b"}
    moves.learn(frozenset("a"), frozenset("ab"), math.inf)
    assert moves.costs["b"] == 0.3 and moves.following(frozenset("a")) == {"b"}
    moves.learn(frozenset("a"), frozenset("b"), 0.3)
    assert moves.following(frozenset("b")) == {"c"}, "nothing is predicted to fit, and this has least to spare"
    moves.learn(frozenset("b"), frozenset("c"), 1.1)
    assert moves.following(frozenset("b")) is None


def test_steps_are_taken_where_they_cost_least() -> None:
    curves = {"flat": Curve.through({0: 0.0, 100: 1.0}), "steep": Curve.through({0: 0.0, 50: 1.0, 100: 9.0})}
    way = allocations(curves, {"flat": 1, "steep": 1}, {"flat": (0, 100), "steep": (0, 100)})
    assert way[0] == {"flat": 0, "steep": 0} and way[-1] == {"flat": 100, "steep": 100} and len(way) == 201
    for before, after in itertools.pairwise(way):
        assert sum(after.values()) == sum(before.values()) + 1
    assert Curve.through({0: 1.0, 10: 0.0, 20: 5.0}).slopes == (0.0, 0.5), "where the loss falls it is flat"
    assert Curve.through({0: 0.0, 10: 3.0, 20: 4.0}).slopes == (0.2, 0.2), "where it grows ever slower it is straight"
