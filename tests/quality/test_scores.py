"""What a difference of accuracies is called."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from sparsify.quality.scores import Score, guesses, mean_and_error


def score(samples: list[float], chance: float | None = None) -> Score:
    value, error = mean_and_error(samples)
    return Score(
        "quiz", "acc", value, error, len(samples), share=True, chance=chance, samples=tuple(samples), sha256="1"
    )


def right(good: int, count: int = 1000) -> Score:
    """The first ``good`` of ``count`` answers are right: of two such one's right ones are the other's too."""
    return score([1.0] * good + [0.0] * (count - good))


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (800, 800, "the same on each of 1000 documents"),
        (800, 797, "no difference that 1000 documents can show"),
        (800, 810, "1.00 points better"),
        (800, 790, "1.00 points lost: slightly worse"),
        (800, 780, "2.00 points lost: clearly worse"),
        (800, 750, "5.00 points lost: much worse"),
        (800, 650, "15.00 points lost: far worse"),
    ],
)
def test_verdicts(before: int, after: int, said: str) -> None:
    pair = right(after).against(right(before))
    assert pair is not None and pair.verdict == said


def test_a_small_difference_that_is_sure_is_called_practically_none() -> None:
    pair = right(7960, 10_000).against(right(8000, 10_000))
    assert pair is not None and pair.verdict == "0.40 points lost: practically the same"


def test_few_documents_say_so() -> None:
    pair = right(2, 20).against(right(18, 20))
    assert pair is not None and pair.verdict == "80.00 points lost: far worse, as far as 20 documents can tell"
    one = right(0, 1).against(right(1, 1))
    assert one is not None and one.standard_error is None
    assert one.verdict == "100.00 points lost: far worse, as far as one document can tell"
    few = right(9, 20).against(right(10, 20))
    assert few is not None
    error = 100 * math.sqrt(0.05 * 0.95 / 19)
    assert few.verdict == (
        f"no difference that 20 documents can show; {5 + 2 * error:.1f} points would look the same, so take more"
    )


def test_pictures_are_called_so() -> None:
    one = replace(right(8, 10), unit="picture")
    pair = one.against(one)
    assert pair is not None and pair.verdict == "the same on each of 10 pictures"


def test_who_guesses() -> None:
    """A model that cannot be told from guessing has nothing to lose."""
    good, bad = score([1.0] * 80 + [0.0] * 20, 0.25), score([1.0] * 28 + [0.0] * 72, 0.25)
    assert guesses(bad) and not guesses(good)
    lost = bad.against(good)
    assert lost is not None and lost.verdict == (
        "52.00 points lost: far worse; it cannot be told from guessing (25.0%)"
    )
    for one, other, said in (
        (bad, bad, "neither can be told from guessing (25.0%)"),
        (good, bad, "the first cannot be told from guessing (25.0%), so that this says little"),
    ):
        pair = one.against(other)
        assert pair is not None and pair.verdict == said
    assert not guesses(score([0.0, 1.0]))


def test_how_values_are_said() -> None:
    assert score([1.0, 0.0, 0.0, 0.0]).said == "25.00% ± 25.00"
    assert Score("a", "word_perplexity", 12.3456, 0.234, 3).said == "12.35 ± 0.23"
    pair = right(790).against(right(800))
    assert pair is not None and pair.said == f"−1.00 ± {100 * math.sqrt(0.01 * 0.99 / 999):.2f}"
    plain = Score("a", "f1", 2.0, None, 2, samples=(1.0, 3.0), sha256="1")
    other = plain.against(plain)
    assert other is not None and other.level is None and other.verdict is None
