from __future__ import annotations

import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsify import passes
from sparsify.errors import SpecError
from sparsify.method.description import describe, describe_passes
from sparsify.method.pattern import NM, Unstructured
from sparsify.method.registry import find, is_own, loaded, registered
from sparsify.method.spec import choices, find_pass, parse_pass, spec_text
from sparsify.method.weight_pass import WeightPass
from sparsify.passes import LowerSparse, Magnitude, Wanda

groups = st.sampled_from(["output", "input", None])


@given(st.sampled_from([Magnitude, Wanda]), groups, st.integers(1, 256), st.sampled_from(["floor", "exact"]))
def test_every_spec_round_trips(kind, group, blocksize, count) -> None:  # type: ignore[no-untyped-def]
    made = kind(Unstructured("0.6"), group or "output", blocksize, count)
    assert parse_pass(spec_text(made)) == made


@pytest.mark.parametrize("name", sorted(registered("sparsify.passes")))
def test_every_registered_pass_round_trips(name: str) -> None:
    if not find("sparsify.passes", name).takes_pattern():
        assert spec_text(parse_pass(name)) == name
        return
    one = {"activation": "50%", "llm-pruner": "50%", "permute": "2:4", "round": "int4"}.get(name)
    for pattern in (one,) if one is not None else ("2:4", "50%"):
        assert spec_text(parse_pass(f"{name}:{pattern}")) == f"{name}:{pattern}"


def test_a_pass_that_takes_no_pattern() -> None:
    assert parse_pass("lower-sparse:choice=smallest,merge=false") == LowerSparse(choice="smallest", merge=False)
    assert spec_text(LowerSparse(merge=False)) == "lower-sparse:merge=false"
    with pytest.raises(SpecError, match="a pattern, which lower-sparse has not"):
        parse_pass("lower-sparse:2:4")


def test_options_reach_the_fields() -> None:
    assert parse_pass("wanda:50%,group=input,blocksize=128") == Wanda(Unstructured("0.5"), "input", 128)
    assert parse_pass("wanda:0.5, variant=true") == Wanda(Unstructured("0.5"), variant=True)
    assert parse_pass("magnitude:2:4") == Magnitude(NM(2, 4))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("wnda:2:4", "Near names: wanda"),
        ("wanda", "no pattern"),
        ("wanda:", "no pattern"),
        ("wanda:2:4,group", "no ="),
        ("wanda:50%,gruop=layer", "Near names: group"),
        ("wanda:50%,group=rows", "output or input or layer"),
        ("wanda:50%,blocksize=x", "a whole number"),
        ("wanda:50%,blocksize=0", "at least 1"),
        ("wanda:50%,variant=maybe", "true or false"),
        ("wanda:50%,variant=true,variant=true", "given twice"),
        ("wanda:50%,group=layer,blocksize=4", "compares all weights"),
        ("wanda:2:4,variant=true", "Ask for a percentage"),
        ("wanda:2:4,group=layer", "its own groups of 4"),
        ("wanda:2:4,count=exact", "its own groups of 4"),
        ("wanda:50%,variant=true,group=input", "its own counts"),
        ("wanda:2:4,sparsity=0.3", "no such option"),
        ("", "nothing of that name"),
    ],
)
def test_what_cannot_be_meant_is_refused(text: str, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_pass(text)
    assert says in str(caught.value)


def test_passes_describe_themselves() -> None:
    rows = {row.name: row for row in describe_passes()}
    options = {name: {o.name: o for o in row.options} for name, row in rows.items()}
    assert "variant" in options["wanda"] and "variant" not in options["magnitude"]
    assert (options["lower-sparse"]["choice"].values, options["lower-sparse"]["choice"].default) == (
        "measured or smallest",
        "measured",
    )
    assert "target" not in options["lower-sparse"], "which no text can spell"
    with pytest.raises(SpecError, match="option 'target' of lower-sparse: no such option"):
        parse_pass("lower-sparse:target=H200")
    shared = {o.name: o for o in rows["wanda"].shared}
    assert shared["blocksize"].default == 1 and rows["wanda"].common == WeightPass.common_to
    assert options["sparsegpt"]["blocksize"].default == 128, "its own default stands with it"


@pytest.mark.parametrize("name", sorted(registered("sparsify.passes")))
def test_a_pass_is_described_as_it_is(name: str) -> None:
    """Its source, read without importing it, says the fields, values and defaults that the class has."""
    kind, row = find_pass(name), describe(name)
    hints = typing.get_type_hints(kind)
    real = {n: (choices(hints[n]), f.default) for n, f in kind.options().items()}
    assert {o.name: (o.values, o.default) for o in (*row.options, *row.shared)} == real
    assert {o.name for o in row.options} == set(kind.options_of_its_own())
    assert (row.summary, row.when, row.example) == (kind.summary, kind.when, kind.example)
    assert row.when and row.does and all(o.meaning for o in (*row.options, *row.shared))
    assert row.form == (f"{name}:PATTERN" if kind.takes_pattern() else name)
    assert parse_pass(row.example).name == name


def test_every_pass_of_ours_is_a_name_of_the_package() -> None:
    """What the command line calls by its name, Python imports from one place."""
    own = [method.__name__ for _, entry, method in loaded("sparsify.passes") if is_own(entry)]
    assert sorted(own) == sorted(passes.__all__)
    assert all(getattr(passes, name).__name__ == name for name in own)
