"""The arithmetic of a verdict against a slow formula, and its words against the table of docs/commands.md."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsify.quality.verdict import FEW, Paired

LOSS = st.floats(min_value=0.0, max_value=20.0, allow_nan=False)
PAIRS = st.lists(st.tuples(LOSS, LOSS), min_size=1, max_size=40)


@given(PAIRS)
def test_the_figures_are_those_of_the_slow_formula(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = [one for one, _ in pairs], [other for _, other in pairs]
    paired = Paired.of(ours, theirs)
    quotient = math.exp(statistics.fmean(ours)) / math.exp(statistics.fmean(theirs))
    assert paired.ratio == pytest.approx(quotient, rel=1e-9) and paired.windows == len(pairs)
    if len(pairs) == 1:
        assert paired.standard_error is None
        return
    differences = np.array(ours) - np.array(theirs)
    slow = float(np.std(differences, ddof=1) / np.sqrt(len(pairs)))
    assert paired.standard_error == pytest.approx(slow, rel=1e-9, abs=1e-12)
    assert (paired.level == "none") == (abs(paired.difference) <= 2 * (paired.standard_error or 0.0))
    back = Paired.of(theirs, ours)
    assert back.difference == pytest.approx(-paired.difference, abs=1e-12)
    assert back.standard_error == pytest.approx(paired.standard_error, abs=1e-12)
    assert (back.level == "none") == (paired.level == "none")


def test_what_is_shared_by_both_models_is_no_noise() -> None:
    """Windows of very different difficulty, and a model that is worse by the same in each."""
    hard = [float(n) for n in range(20)]
    paired = Paired.of([loss + 0.1 for loss in hard], hard)
    assert paired.standard_error == pytest.approx(0, abs=1e-12)
    assert paired.verdict == "1.105 times the first perplexity: clearly worse"


def test_noise_alone_is_called_no_difference() -> None:
    """Two standard errors: about one in twenty of models that are equal is called different, and no more."""
    draw = np.random.default_rng(0)
    called = [Paired.of(draw.normal(3, 0.3, 64).tolist(), draw.normal(3, 0.3, 64).tolist()).level for _ in range(600)]
    assert 0.02 < sum(level != "none" for level in called) / 600 < 0.08


def of_ratio(ratio: float, error: float | None = 1e-6, windows: int = 64, do: str = "do this") -> str:
    return Paired(math.log(ratio), error, windows, "the dense perplexity", do).verdict


@pytest.mark.parametrize(
    ("ratio", "said"),
    [
        (0.5, "0.500 times the dense perplexity: better"),
        (0.9900, "0.990 times the dense perplexity: better"),
        (0.9902, "0.990 times the dense perplexity: practically the same"),
        (1.0099, "1.010 times the dense perplexity: practically the same"),
        (1.0101, "1.010 times the dense perplexity: slightly worse"),
        (1.0499, "1.050 times the dense perplexity: slightly worse"),
        (1.0501, "1.050 times the dense perplexity: clearly worse; do this"),
        (1.2499, "1.250 times the dense perplexity: clearly worse; do this"),
        (1.2501, "1.250 times the dense perplexity: much worse; do this"),
        (1.9999, "2.000 times the dense perplexity: much worse; do this"),
        (2.0001, "2.000 times the dense perplexity: far worse; do this"),
        (123456.0, "1.23e+05 times the dense perplexity: far worse; do this"),
    ],
)
def test_what_a_ratio_is_called(ratio: float, said: str) -> None:
    assert of_ratio(ratio) == said


def test_what_cannot_be_told_is_not() -> None:
    none = "1.010 times the dense perplexity: no difference that 64 windows can show"
    assert of_ratio(1.01, error=0.01) == none
    assert of_ratio(1.3, error=0.2).endswith("show; 1.939 times would look the same, so take more")
    assert of_ratio(1.3, error=None, windows=1, do="") == (
        "1.300 times the dense perplexity: much worse, as far as one window can tell"
    )
    assert of_ratio(1.3, windows=FEW - 1).endswith("much worse, as far as 7 windows can tell; do this")
    assert Paired.of([1.0, 2.0], [1.0, 2.0]).level == "none"


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_no_number_is_said(broken: float) -> None:
    paired = Paired.of([1.0, broken], [1.0, 2.0], do="do this")
    assert paired.standard_error is None and math.isinf(paired.ratio)
    assert paired.verdict == "its perplexity is no number: this model predicts nothing; do this"
    assert Paired.of([800.0] * 9, [1.0] * 9).level == "no number", "past the largest float"


def test_lists_of_other_lengths_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="longer"):
        Paired.of([1.0], [1.0, 2.0])
