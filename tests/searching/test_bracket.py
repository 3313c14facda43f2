"""The one-dimensional search: monotone curves to the last number, others to one that was measured, few calls."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from sparsify.searching.strategy.bracket import highest


@given(
    st.lists(st.floats(0, 5), min_size=2, max_size=250),
    st.floats(-20, 20),
    st.integers(0, 260),
    st.sampled_from([0.0, 1.0, math.inf]),
)
def test_of_a_curve_that_never_falls_the_largest_number_is_found(
    rises: list[float], start: float, first: int, cliff: float
) -> None:
    values, level = [], start
    for rise in rises:
        level += rise
        values.append(level if level <= 0 or cliff == 0 else level * (1 + cliff))
    asked: list[int] = []

    def excess(number: int) -> float:
        asked.append(number)
        return values[number - 1]

    found = highest(excess, 0, len(values) + 1, 8)
    holds = [number for number, value in enumerate(values, 1) if value <= 0]
    assert found == (max(holds) if holds else None)
    assert len(asked) <= 8 and len(set(asked)) == len(asked)
    # Where it begins is its caller's guess: a bad one may cost what is found, never the bounds.
    asked.clear()
    found = highest(excess, 0, len(values) + 1, 8, first)
    assert (found is None or values[found - 1] <= 0) and len(asked) <= 8 and all(0 < n <= len(values) for n in asked)


@given(st.lists(st.floats(-5, 5), max_size=100), st.integers(0, 12))
def test_of_any_curve_what_is_found_was_measured_and_holds(values: list[float], most: int) -> None:
    asked: list[int] = []

    def excess(number: int) -> float:
        asked.append(number)
        return values[number - 1]

    found = highest(excess, 0, len(values) + 1, most)
    assert len(asked) <= most and len(set(asked)) == len(asked)
    assert found == max((number for number in asked if values[number - 1] <= 0), default=None)


def test_straight_lines_take_few_calls() -> None:
    asked: list[int] = []

    def excess(number: int) -> float:
        asked.append(number)
        return number / 100 - 0.615

    assert highest(excess, 0, 100, 8) == 61 and len(asked) <= 5
