"""Percentages for kinds of layers: the option ``kinds`` of every pass that prunes weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import sparsify
from sparsify.errors import SpecError
from sparsify.method.pattern import Unstructured, belongs, parse_shares, shares_text
from sparsify.method.spec import parse_pass, spec_text

names = st.text("abcdefgh_.*", min_size=1, max_size=12)
halves = st.integers(1, 199).map(lambda level: Unstructured(f"{level / 200}"))


@given(st.dictionaries(names, halves, max_size=6))
def test_every_text_round_trips(shares: dict[str, Unstructured]) -> None:
    assert parse_shares(shares_text(shares)) == shares
    if shares:
        spec = f"wanda:50%,kinds={shares_text(shares)}"
        assert spec_text(parse_pass(spec)) == spec


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("wanda:50%,kinds=o_proj", "'o_proj', which is no KIND@PERCENTAGE"),
        ("wanda:50%,kinds=@40%", "no KIND@PERCENTAGE"),
        ("wanda:50%,kinds=o_proj@40%/", "'', which is no KIND@PERCENTAGE"),
        ("wanda:50%,kinds=o_proj@40%/o_proj@50%", "o_proj twice"),
        ("wanda:50%,kinds=o_proj@0%", "not strictly between"),
        ("wanda:50%,kinds=o_proj@40", "Write 40%"),
        ("wanda:50%,kinds=o_proj@2:4", "2:4 for o_proj"),
        ("wanda:2:4,kinds=o_proj@40%", "2:4 fixes the zeros"),
        ("wanda:50%,allocation=owl,kinds=o_proj@40%", "each shares the zeros out"),
    ],
)
def test_what_cannot_be_meant_is_refused(spec: str, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_pass(spec)
    assert says in str(caught.value)


@pytest.mark.parametrize("spec", ["magnitude", "wanda", "sparsegpt"])
def test_each_kind_gets_its_own(spec: str, folder: Callable[[str], Path], ids: Tensor) -> None:
    made = sparsify.compile(folder("llama"), [f"{spec}:50%,kinds=mlp.down_proj@25%/q_proj@75%"], calibration=[ids])
    for site in made.runs[0].sites:
        kind = site.name.rpartition(".")[2]
        assert site.kept == pytest.approx({"down_proj": 0.75, "q_proj": 0.25}.get(kind, 0.5), abs=0.04), site.name
        assert site.pattern == {"down_proj": "25%", "q_proj": "75%"}.get(kind, "50%")


def test_a_kind_that_is_not_there_is_named(folder: Callable[[str], Path]) -> None:
    with pytest.raises(SpecError, match=r"no kind of layer called qproj .* Near names: .*q_proj"):
        sparsify.compile(folder("llama"), ["magnitude:50%,kinds=qproj@25%"])
    with pytest.raises(SpecError, match="no kind of layer called o_proj"):
        sparsify.compile(folder("llama"), ["magnitude:50%,kinds=o_proj@25%"], ignore=["*.o_proj"])


def test_the_longest_name_counts() -> None:
    assert belongs("m.*.mlp.c_proj", "c_proj") and belongs("m.*.mlp.c_proj", "mlp.c_proj")
    assert not belongs("m.*.mlp.c_proj", "proj") and belongs("*", "*")
