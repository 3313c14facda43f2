"""Both sides of every size at which selection takes another way, against a stable sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.method import selection
from sparsify.method.pattern import NM, Unstructured
from sparsify.method.selection import falls_short, lowest, select, smallest

# Rows of as many members as this are sampled first.
LONG = selection._SAMPLE * 8


def head(rows: torch.Tensor, k: int) -> torch.Tensor:
    order = rows.sort(dim=1, stable=True).indices[:, :k]
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order, True)


@pytest.mark.parametrize("members", [LONG - 1, LONG, LONG + 4097])
@pytest.mark.parametrize("values", ["apart", "tied"])
def test_one_long_row(members: int, values: str) -> None:
    generator = torch.Generator().manual_seed(members)
    row = torch.rand(1, members, generator=generator)
    if values == "tied":
        row = (row * 16).floor()
    for k in (1, 2, 1000, members // 2, members - 1, members):
        assert torch.equal(smallest(row, k), head(row, k)), k


@pytest.mark.parametrize("k", [1, 40_000, 69_999])
def test_a_long_row_whose_sample_misleads(k: int) -> None:
    """Every value that the sample sees is the greatest, or the least: the k-th lies elsewhere."""
    for seen in (-1.0, 2.0):
        row = torch.rand(1, 70_000, generator=torch.Generator().manual_seed(0))
        row[:, :: 70_000 // selection._SAMPLE] = seen
        assert torch.equal(smallest(row, k), head(row, k))


@settings(deadline=None, max_examples=60)
@given(st.integers(500, 530), st.integers(0, 500), st.integers(1, 400), st.integers(0, 10**6))
def test_the_sampled_way_is_the_rule_for_any_values(members: int, k: int, distinct: int, seed: int) -> None:
    """A small sample, so that long begins at 512."""
    row = torch.randint(0, distinct, (1, members), generator=torch.Generator().manual_seed(seed)).float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_SAMPLE", 64)
        assert torch.equal(smallest(row, k), head(row, k))


@pytest.mark.parametrize("m", [selection._PAIRWISE_LIMIT, selection._PAIRWISE_LIMIT + 1])
def test_ranks_by_pairs_and_by_a_sort_agree(m: int) -> None:
    members = torch.randint(0, 3, (m, 200), generator=torch.Generator().manual_seed(0)).float()
    for drop in range(m + 1):
        assert torch.equal(lowest(members, drop), head(members.t(), drop).t())


@pytest.mark.parametrize("groups", [6, 7, 8, 14])
def test_groups_are_taken_some_at_a_time(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_GROUPS_AT_ONCE", 7)
    scores = torch.rand(1, groups * 4, generator=torch.Generator().manual_seed(groups))
    assert torch.equal(select(scores, NM(1, 4)).view(-1, 4), head(scores.view(-1, 4), 3))


def test_a_matrix_falls_short_by_less_than_one_weight_of_each_row() -> None:
    """Half of 4 × 5: two of each row are eight, and so few are allowed; ten are due."""
    weight = torch.ones(4, 5)
    weight[:, :2] = 0
    assert falls_short(weight, Unstructured("0.5")) is None
    weight[:2, 1] = 1
    assert falls_short(weight, Unstructured("0.5")) == "6 of 20 weights are zero, 50% asks for 10"
    weight[0, 1] = 0
    assert falls_short(weight, Unstructured("0.5")) is None
