"""The updates of Wanda, magnitude and their like, against slow references in float64."""

from __future__ import annotations

import pytest
from support import slow
from torch import Tensor

from sparsify.errors import SpecError
from sparsify.method.spec import parse_pass


@pytest.mark.parametrize("kind", slow.KINDS)
@pytest.mark.parametrize("method", ["wanda", "magnitude"])
@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_sequential_and_iterative_updates(method: str, kind: str, pattern: str) -> None:
    weight, inputs = slow.problem(kind, columns=192)
    h, dead = slow.damped(inputs)
    stats = slow.statistics(inputs)
    norms = stats.squared_norm.sqrt()

    def scores(columns: Tensor, first: int, diagonal: Tensor) -> Tensor:
        return columns.abs() * (norms[first : first + columns.shape[1]] if method == "wanda" else 1)

    goal = weight.double().masked_fill(dead, 0)
    plain = parse_pass(f"{method}:{pattern}").prune(weight, stats)
    ours = parse_pass(f"{method}:{pattern},update=sequential").prune(weight, stats)
    reference, mask = slow.column_by_column(weight, h, dead, pattern, scores, mask=plain.mask)
    slow.agree(ours.weight, ours.mask & ~dead, reference, mask & ~dead, goal, h)
    ours = parse_pass(f"{method}:{pattern},update=iterative").prune(weight, stats)
    reference, mask = slow.column_by_column(weight, h, dead, pattern, scores)
    slow.agree(ours.weight, ours.mask & ~dead, reference, mask & ~dead, goal, h)


@pytest.mark.parametrize("kind", slow.KINDS)
def test_block_compensation_equals_the_definition(kind: str) -> None:
    weight, inputs = slow.problem(kind, rows=6, columns=192)
    h, dead = slow.damped(inputs)
    stats = slow.statistics(inputs)
    mask = parse_pass("wanda:50%").prune(weight, stats).mask
    ours = parse_pass("wanda:50%,update=block").prune(weight, stats)
    reference = slow.block_by_block(weight.double().masked_fill(dead, 0), h, mask, 128)
    assert slow.close(ours.weight, reference.masked_fill(dead, 0))


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("wanda:2:4,percdamp=0.1", "update=none"),
        ("wanda:2:4,target=dense", "update=none"),
        ("wanda:2:4,update=exact,blend=0.7", "target=pruned"),
        ("wanda:2:4,update=sequential,solver=cg", "update=exact"),
        ("wanda:50%,update=iterative,group=layer", "compares within 128 columns"),
        ("wanda:50%,variant=true,update=iterative", "both choose the mask"),
    ],
)
def test_contradictory_options_are_refused(spec: str, match: str) -> None:
    with pytest.raises(SpecError, match=match):
        parse_pass(spec)
