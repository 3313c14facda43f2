"""Groups of channels: never worse than they were, and the best that there is where all can be tried."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sparsify.passes.solvers.assignment import assign
from sparsify.passes.solvers.grouping import kept, search


def worth(channels: int, rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(torch.randn(channels, 1, generator=generator))
    return (torch.randn(channels, rows, generator=generator) * sizes).square()


def by_hand(scores: Tensor, n: int, m: int) -> float:
    total = 0.0
    for row in scores.t().tolist():
        total += sum(sum(sorted(row[at : at + m])[-n:]) for at in range(0, len(row), m))
    return total


def halves(channels: int) -> Iterator[list[int]]:
    for first in itertools.combinations(range(1, channels), channels // 2 - 1):
        yield [0, *first, *(c for c in range(channels) if c and c not in first)]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (4, 8), (1, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_an_order_is_a_permutation_that_keeps_no_less(n: int, m: int, seed: int) -> None:
    scores = worth(48, 9, seed)
    order = search(scores, n, m, seed)
    assert sorted(order.tolist()) == list(range(48))
    assert kept(scores, n, m) == pytest.approx(by_hand(scores, n, m))
    assert kept(scores[order], n, m) > kept(scores, n, m)
    again = scores[order]
    assert kept(again[search(again, n, m, seed + 1)], n, m) >= kept(again, n, m)
    assert torch.equal(order, search(scores, n, m, seed))


@pytest.mark.parametrize("seed", range(4))
def test_two_groups_are_split_nearly_as_well_as_they_can_be(seed: int) -> None:
    scores = worth(8, 3, seed)
    best = max(by_hand(scores[order], 2, 4) for order in halves(8))
    found = kept(scores[search(scores, 2, 4, 0)], 2, 4)
    assert found >= kept(scores, 2, 4) and found >= 0.98 * best


def test_large_channels_are_spread_where_they_lay_together() -> None:
    scores = torch.full((16, 5), 0.01)
    scores[:8] = 1.0
    assert kept(scores, 2, 4) == pytest.approx(5 * (4 + 4 * 0.01), rel=1e-5)
    assert kept(scores[search(scores, 2, 4, 0)], 2, 4) == pytest.approx(5 * 8, rel=1e-5)


def test_what_cannot_gain_stays() -> None:
    for scores in (torch.ones(12, 4), torch.zeros(12, 4), worth(4, 5, 0)):
        assert torch.equal(search(scores, 2, 4, 0), torch.arange(len(scores)))


def test_an_assignment_is_nearly_the_best() -> None:
    for seed in range(5):
        benefit = torch.rand(6, 6, generator=torch.Generator().manual_seed(seed))
        place = assign(benefit)
        assert sorted(place.tolist()) == list(range(6))
        best = max(sum(float(benefit[i, j]) for i, j in enumerate(p)) for p in itertools.permutations(range(6)))
        assert float(benefit[torch.arange(6), place].sum()) >= best - 6 * 0.002


def test_an_assignment_ends_where_all_benefits_are_alike_or_large() -> None:
    assert assign(torch.ones(5, 5)).tolist() == list(range(5))
    assert assign(torch.ones(1, 1)).tolist() == [0]
    ties = torch.zeros(40, 40)
    ties[:, 0] = 1e30
    assert sorted(assign(ties).tolist()) == list(range(40))
    near = 1e7 + torch.rand(40, 40, generator=torch.Generator().manual_seed(0))
    assert sorted(assign(near).tolist()) == list(range(40))
