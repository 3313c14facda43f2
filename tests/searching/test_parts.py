"""Kinds as the graph has them, parts, and patterns of --ignore that name exactly what is to stay dense."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsify.ir.program import Program
from sparsify.method.pattern import NM, Unstructured
from sparsify.prune.names import Wanted
from sparsify.prune.targets import choose
from sparsify.searching.parts import cells, ignoring, kinds_of, short_names, size_of


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("llama", ["q/k/v_proj", "o_proj", "gate/up_proj", "down_proj"]),
        ("gpt2", ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]),
        ("mixtral", ["q/k/v_proj", "o_proj", "gate_up_proj", "down_proj"]),
    ],
)
def test_kinds_are_sites_that_read_one_input(family: str, kinds: list[str], captured: Callable[[str], Program]) -> None:
    targets, _ = choose(captured(family), Unstructured("0.5"), Wanted())
    found = kinds_of(targets)
    assert list(found) == kinds
    assert sorted(t.parameter for own in found.values() for t in own) == sorted(t.parameter for t in targets)


def test_parts_are_kinds_by_block(captured: Callable[[str], Program]) -> None:
    targets, _ = choose(captured("llama"), NM(2, 4), Wanted())
    blocks = list(dict.fromkeys(target.site.block for target in targets))
    parts = cells(targets)
    assert len(parts) == 4 * len(blocks) and sum(part.size for part in parts) == sum(map(size_of, targets))
    assert parts[0].name == f"q/k/v_proj of {blocks[0]}" and len(parts[0].targets) == 3
    few = cells(targets, 1)
    assert [part.kind for part in few] == list(kinds_of(targets)) and few[0].blocks == tuple(blocks)
    assert few[0].name == f"q/k/v_proj of {blocks[0]}…{str(blocks[-1]).rpartition('.')[2]}"
    assert sorted(t.parameter for part in few for t in part.targets) == sorted(t.parameter for t in targets)


def test_short_names_call_one_kind_each() -> None:
    kinds = {"m.*.attn.c_proj", "m.*.mlp.c_proj", "m.*.mlp.experts.*.up", "m.*.mlp.up", "fc", "head.fc"}
    assert short_names(kinds) == {
        "m.*.attn.c_proj": "attn.c_proj",
        "m.*.mlp.c_proj": "mlp.c_proj",
        "m.*.mlp.experts.*.up": "*.up",
        "m.*.mlp.up": "mlp.up",
        "fc": "fc",
        "head.fc": "head.fc",
    }


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@given(bits=st.integers(0, 2**60 - 1), whole=st.sampled_from([None, "kind", "block"]))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ignoring_names_exactly_the_dense(
    family: str, bits: int, whole: str | None, captured: Callable[[str], Program]
) -> None:
    program = captured(family)
    targets, _ = choose(program, Unstructured("0.5"), Wanted())
    keys = [getattr(t.site, whole) if whole else t.parameter for t in targets]
    place = {key: at for at, key in enumerate(dict.fromkeys(keys))}
    dense = [t for t, key in zip(targets, keys, strict=True) if bits >> place[key] & 1]
    pruned = [t for t in targets if t not in dense]
    patterns = ignoring(dense, pruned)
    assert len(patterns) <= len(dense) and len(set(patterns)) == len(patterns)
    if pruned:
        left, _ = choose(program, Unstructured("0.5"), Wanted.of(program.weights, ignore=patterns))
        assert [t.parameter for t in left] == [t.parameter for t in pruned]
    if whole == "block" and dense:
        assert len(patterns) <= len(place)
