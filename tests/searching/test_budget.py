"""Budgets as text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsify.errors import SpecError
from sparsify.searching.budget import Budget, parse_budget


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("perplexity<=1.05", 10.5),
        ("perplexity<=1.05x", 10.5),
        ("perplexity<=+5%", 10.5),
        (" perplexity <= 1 ", 10.0),
        ("perplexity≤+0.5%", 10.05),
        ("perplexity<=12.3abs", 12.3),
        ("perplexity<=12.3x", 123.0),
        ("perplexity<=+250%", 35.0),
    ],
)
def test_forms(text: str, limit: float) -> None:
    assert parse_budget(text).limit(10.0) == pytest.approx(limit)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "nothing to measure"),
        ("1.05", "nothing to measure"),
        ("<=1.05", "nothing to measure"),
        ("perplexty<=1.05", "Near names: perplexity"),
        ("accuracy>=0.9", "'accuracy', which is not measured"),
        ("perplexity", "no <="),
        ("perplexity<1.05", "'<' for <="),
        ("perplexity>=1.05", "'>=' for <="),
        ("perplexity=1.05", "'=' for <="),
        ("perplexity<=", "'', which is no bound"),
        ("perplexity<=five", "no bound"),
        ("perplexity<=nan", "no bound"),
        ("perplexity<=inf", "no bound"),
        ("perplexity<=1e3", "no bound"),
        ("perplexity<=-5%", "no bound"),
        ("perplexity<=5%", "no bound"),
        ("perplexity<=+1.05", "no bound"),
        ("perplexity<=1.05.1", "no bound"),
        ("perplexity<=" + "9" * 400, "no bound"),
        ("perplexity<=0.95", "better than that"),
        ("perplexity<=0.05", "better than that"),
        ("perplexity<=0.3abs", "below 1"),
        ("perplexity<=12.3", "perplexity<=12.3abs for the perplexity itself"),
    ],
)
def test_nonsense_is_refused(text: str, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_budget(text)
    assert says in str(caught.value) and caught.value.exit_code == 2


@given(st.integers(1000, 10**7), st.booleans())
def test_every_budget_round_trips(thousandths: int, absolute: bool) -> None:
    budget = Budget(thousandths / 1000, absolute)
    assert parse_budget(str(budget)) == budget


@given(st.text(max_size=30))
def test_any_text_is_a_budget_or_refused(text: str) -> None:
    try:
        assert parse_budget(f"perplexity<={text}").most >= 1
    except SpecError:
        return
