"""Which promises of a pass are checked after each of its matrices: those that it declares."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify.errors import VerifyError
from sparsify.method.pattern import Unstructured
from sparsify.method.spec import parse_pass
from sparsify.method.statistics import InputStatistics
from sparsify.method.weight_pass import Pruned, WeightPass
from sparsify.prune.verify import verify_pruned


@dataclass(frozen=True)
class FirstRows(WeightPass):
    """All weights of the first half of the rows go: half of the matrix, and no half of any row."""

    name: ClassVar[str] = "first-rows"

    def prune(self, weight: Tensor, statistics: InputStatistics) -> Pruned:
        mask = torch.zeros_like(weight, dtype=torch.bool)
        mask[: len(weight) // 2] = True
        return Pruned(weight.masked_fill(mask, 0), mask)


@dataclass(frozen=True)
class Loose(FirstRows):
    """The same, and says that it does not keep to the pattern's counts."""

    @property
    def exact_counts(self) -> bool:
        return False


def lopsided(weight: Tensor) -> Pruned:
    return FirstRows(Unstructured("0.5")).prune(weight, InputStatistics({}, 0, 0))


def test_counts_are_checked_group_by_group() -> None:
    weight = torch.rand(4, 8) + 0.1
    with pytest.raises(VerifyError, match=r"wanda on x: .*Report this as a bug in the pass"):
        verify_pruned("x", parse_pass("wanda:50%"), weight, lopsided(weight))
    verify_pruned("x", parse_pass("magnitude:50%"), weight, lopsided(weight))  # one group, the whole layer


def test_a_pass_that_declares_other_counts_is_not_held_to_the_patterns() -> None:
    weight = torch.rand(4, 8) + 0.1
    variant = parse_pass("wanda:50%,variant=true")
    assert isinstance(variant, WeightPass) and not variant.exact_counts
    verify_pruned("x", variant, weight, lopsided(weight))
    with pytest.raises(VerifyError, match="a kept weight that changed"):
        verify_pruned("x", variant, weight * 2, lopsided(weight))


def test_any_pass_may_declare_it() -> None:
    """The core knows no option of anybody's: a pass of a package of its own is asked the same."""
    net, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(16, 8)
    with pytest.raises(VerifyError, match="first-rows on 0"):
        sparsify.compile(net, [FirstRows(Unstructured("0.5"))], calibration=[x])
    made = sparsify.compile(net, [Loose(Unstructured("0.5"))], calibration=[x])
    assert not made.weight("0.weight")[:2].any() and made.weight("0.weight")[2:].all()


@pytest.mark.parametrize("spec", ["sparsegpt:50%", "wanda:50%", "wanda:50%,update=exact"])
def test_what_a_pass_may_not_leave(spec: str) -> None:
    """Whether it moves the weights that it keeps or not: zeros under the mask, shapes, and finite numbers."""
    weight = torch.rand(4, 8) + 0.1
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[:, ::2] = True
    method = parse_pass(spec)
    assert isinstance(method, WeightPass)
    method = replace(method, group="layer") if method.name == "wanda" else method
    good = weight.masked_fill(mask, 0)
    verify_pruned("x", method, weight, Pruned(good, mask))
    left, broken = good.clone(), good.clone()
    left[2, 4], broken[0, 1] = 1e-3, torch.nan
    with pytest.raises(VerifyError, match="a pruned weight that is not zero"):
        verify_pruned("x", method, weight, Pruned(left, mask))
    with pytest.raises(VerifyError, match="a weight that is NaN or infinite"):
        verify_pruned("x", method, weight, Pruned(broken, mask))
    with pytest.raises(VerifyError, match=r"shape \(2, 8\) for a weight of \(4, 8\)"):
        verify_pruned("x", method, weight, Pruned(good[:2], mask[:2]))
    with pytest.raises(VerifyError, match="shape"):
        verify_pruned("x", method, weight, Pruned(good, mask[:2]))
