from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsify.errors import PatternError
from sparsify.method.pattern import NM, Unstructured, parse_pattern

percents = st.integers(1, 9999).map(lambda n: Unstructured(Fraction(n, 10000)))
nms = st.integers(1, 63).flatmap(lambda n: st.integers(n + 1, 64).map(lambda m: NM(n, m)))


@given(percents | nms)
def test_every_pattern_prints_as_it_parses(pattern: Unstructured | NM) -> None:
    assert parse_pattern(str(pattern)) == pattern


def test_every_thousandth_prints_as_it_parses() -> None:
    """Whole percentages, halves, fifths and tenths: each prints in its own way."""
    for n in range(1, 1000):
        assert parse_pattern(str(Unstructured(Fraction(n, 1000)))).sparsity == Fraction(n, 1000)


@given(st.text(max_size=8))
def test_any_text_is_a_pattern_or_a_pattern_error(text: str) -> None:
    try:
        pattern = parse_pattern(text)
    except PatternError:
        return
    assert 0 < pattern.sparsity < 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("50%", Unstructured(Fraction(1, 2))),
        ("0.5", Unstructured(Fraction(1, 2))),
        (".25", Unstructured(Fraction(1, 4))),
        ("12.5%", Unstructured(Fraction(1, 8))),
        ("29%", Unstructured(Fraction(29, 100))),
        ("2:4", NM(2, 4)),
        (" 4:8 ", NM(4, 8)),
        ("1:3", NM(1, 3)),
    ],
)
def test_forms(text: str, expected: Unstructured | NM) -> None:
    assert parse_pattern(text) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("2of4", "N:M"),
        ("5:4", "Did you mean 4:5?"),
        ("4:4", "1 ≤ N < M"),
        ("0:4", "1 ≤ N < M"),
        ("50", "50%"),
        ("1.5", "between 0 and 1"),
        ("100%", "leaves nothing"),
        ("0%", "prunes nothing"),
        ("150%", "between 0 and 1"),
        ("-0.5", "percentage"),
        ("nan", "percentage"),
        ("", "percentage"),
        ("2:4:8", "N:M"),
    ],
)
def test_refusals_say_what_to_write(text: str, says: str) -> None:
    with pytest.raises(PatternError) as caught:
        parse_pattern(text)
    assert says in str(caught.value)


def test_nm_keeps_n_as_nvidia_means_it() -> None:
    assert NM(1, 4).sparsity == Fraction(3, 4)


def test_unfit_names_the_width() -> None:
    assert NM(3, 7).unfit(96) == "in_features 96 is not a multiple of 7"
    assert NM(2, 4).unfit(96) is None
    assert Unstructured(0.5).unfit(7) is None
