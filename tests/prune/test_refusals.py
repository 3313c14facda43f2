"""What the engine refuses before anything runs, and what its defaults are."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from support.chain import Chain
from support.families import build, inputs
from torch import nn

import sparsify
from sparsify.errors import PatternError, SpecError
from sparsify.method.pattern import Unstructured
from sparsify.prune.allocation import ERROR_SPREAD, OWL_SPREAD, _Budget, _cheapest


@pytest.mark.parametrize("schedule", ["layer", "block", "dense"])
@pytest.mark.parametrize("spec", ["twin:2:4", "wanda:2:4,update=exact,target=dense"])
def test_fitting_to_the_dense_model_needs_two_models(schedule: Any, spec: str) -> None:
    """In schedule dense the inputs of the pruned model are those of the dense one."""
    x = torch.randn(40, 16)
    if schedule == "dense":
        with pytest.raises(SpecError, match=r"in schedule dense: one stream\. Use --schedule layer"):
            sparsify.compile(Chain(), [spec], calibration=[x], schedule=schedule)
    else:
        assert sparsify.compile(Chain(), [spec], calibration=[x], schedule=schedule).runs[0].kept == 0.5


@pytest.mark.parametrize(("allocation", "spread"), [("owl", OWL_SPREAD), ("error", ERROR_SPREAD)])
def test_each_allocation_has_a_spread_of_its_own(allocation: str, spread: float) -> None:
    """Sites at the bounds are there: nothing lies beyond, and with a greater spread something does."""
    model, batch = build("llama"), inputs("llama", rows=4)
    with torch.no_grad():
        for at, layer in enumerate(model.model.layers):
            for parameter in layer.parameters():
                parameter.mul_(1 + 50 * at)
            layer.mlp.down_proj.weight[::5, ::7] *= 30 * (1 - at)

    def shares(spec: str) -> list[float]:
        return [1 - site.kept for site in sparsify.compile(model, [spec], calibration=[batch]).runs[0].sites]

    usual = shares(f"wanda:50%,allocation={allocation}")
    given = shares(f"wanda:50%,allocation={allocation},spread={spread}")
    assert usual == given
    assert max(abs(share - 0.5) for share in usual) <= spread + 0.01
    assert shares(f"wanda:50%,allocation={allocation},spread={1.5 * spread}") != usual


class Flat:
    """Targets whose error does not depend on what they lose."""

    def errors(self, target: Any, levels: Any) -> list[float]:
        return [0.0 for _ in levels]


def test_more_zeros_than_the_bounds_leave_room_for() -> None:
    target: Any = type("Target", (), {"parameter": "w"})()
    budget = _Budget({"w": 100}, 70, Fraction(1, 2), Fraction(3, 5))
    with pytest.raises(PatternError, match=r"the upper bound of 60\.0% per site leaves 10 of them out"):
        _cheapest([target], Flat(), budget)  # type: ignore[arg-type]
    assert _cheapest([target], Flat(), _Budget({"w": 100}, 60, Fraction(1, 2), Fraction(3, 5))) == {"w": 60}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("wanda:50%,allocation=owl,spread=0", "between 0 and 1"),
        ("wanda:50%,allocation=owl,spread=1", "between 0 and 1"),
        ("wanda:50%,allocation=owl,outliers=1", "exceeds the mean"),
        ("wanda:50%,allocation=error,outliers=3", "belongs to allocation=owl"),
        ("wanda:50%,allocation=owl,count=exact", "fixes all counts"),
        ("wanda:2:4,allocation=owl", "fixes the zeros of every site"),
        ("wanda:50%,spread=0.1", "the same sparsity"),
        ("wanda:50%,blocksize=0", "at least 1"),
        ("wanda:50%,group=layer,blocksize=2", "all weights of a layer"),
        ("wanda:2:4,group=layer", "within its own groups of 4"),
        ("apt:50%,mask=M", "all candidates"),
        ("wanda:50%,update=exact,percdamp=101", "share of the diagonal"),
        ("wanda:50%,update=exact,target=dense,blend=0", r"it must lie in \(0, 1\]"),
    ],
)
def test_options_that_cannot_be_meant(spec: str, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        sparsify.parse_pass(spec)


def test_a_weight_that_there_is_not() -> None:
    made = sparsify.compile(nn.Sequential(nn.Linear(4, 4)), ["magnitude:50%"], calibration=[torch.randn(2, 4)])
    assert int((made.weight("0.weight") == 0).sum()) == 8
    with pytest.raises(SpecError, match=r"weight 0\.wieght: no such parameter\. Near names: 0\.weight"):
        made.weight("0.wieght")


def test_a_pass_of_no_kind_that_runs() -> None:
    from sparsify.method.base import Pass

    class Strange(Pass):
        kind = "weights"
        name = "strange"
        summary = "nothing"
        changes = frozenset({"weights"})
        follows = frozenset({"weights"})

    with pytest.raises(SpecError, match="that nothing here runs"):
        sparsify.compile(nn.Linear(4, 4), [Strange()], calibration=[torch.randn(2, 4)])


def test_the_allocated_total_is_split_over_sites_that_keep_something() -> None:
    with pytest.raises(PatternError, match="would lose"):
        sparsify.compile(Chain(), ["wanda:95%,allocation=error,spread=0.9"], calibration=[torch.randn(40, 16)])
    assert isinstance(sparsify.parse_pass("wanda:95%").pattern, Unstructured)  # type: ignore[attr-defined]
