"""Selection against the rules of algorithms.md, section 1.4, written out slowly."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sparsify.errors import PatternError
from sparsify.method.pattern import NM, Unstructured
from sparsify.method.selection import Axis, Comparison, Count, holds, nm_broken, nm_most, select, smallest

# Few distinct values, so that ties are the rule.
tied = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 7), st.integers(1, 24)), elements=st.sampled_from([0, 1, 2, 3.5])
)
shares = st.integers(1, 99).map(lambda n: Unstructured(Fraction(n, 100)))


def slow_smallest(values: list[float], k: int) -> list[bool]:
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    return [i in set(order[:k]) for i in range(len(values))]


def slow_groups(rows: int, columns: int, comparison: Comparison) -> list[list[tuple[int, int]]]:
    """Members of each comparison group, in index order, from the table of section 4."""
    cells = [(i, j) for i in range(rows) for j in range(columns)]
    key = {
        "layer": lambda c: 0,
        "output": lambda c: c[0] // comparison.blocksize,
        "input": lambda c: c[1] // comparison.blocksize,
    }[comparison.axis]
    groups: dict[int, list[tuple[int, int]]] = {}
    for cell in cells:
        groups.setdefault(key(cell), []).append(cell)
    return list(groups.values())


@settings(deadline=None, max_examples=60)
@given(
    tied,
    shares,
    st.sampled_from(["output", "input", "layer"]),
    st.integers(1, 5),
    st.sampled_from(["floor", "exact"]),
)
def test_unstructured_equals_the_rule(scores, pattern, axis, blocksize, count) -> None:  # type: ignore[no-untyped-def]
    comparison = Comparison(axis, 1 if axis == "layer" else blocksize, count)
    mask = select(torch.from_numpy(scores), pattern, comparison)
    for group in slow_groups(*scores.shape, comparison):
        share = pattern.sparsity if count == "exact" else float(pattern.sparsity)
        expected = slow_smallest([float(scores[c]) for c in group], int(len(group) * share))
        assert [bool(mask[c]) for c in group] == expected


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 12).flatmap(
        lambda m: st.tuples(
            st.integers(1, m - 1),
            st.just(m),
            hnp.arrays(
                np.float32,
                st.tuples(st.integers(1, 5), st.integers(1, 4).map(lambda g: g * m)),
                elements=st.sampled_from([0, 1, 2]),
            ),
        )
    )
)
def test_nm_prunes_the_lowest_of_each_group_with_ties_to_the_lower_index(case) -> None:  # type: ignore[no-untyped-def]
    n, m, scores = case
    mask = select(torch.from_numpy(scores), NM(n, m))
    for i, row in enumerate(scores):
        for start in range(0, len(row), m):
            expected = slow_smallest([float(v) for v in row[start : start + m]], m - n)
            assert mask[i, start : start + m].tolist() == expected


@settings(deadline=None, max_examples=40)
@given(tied, st.integers(0, 30))
def test_smallest_equals_the_head_of_a_stable_sort(scores, k) -> None:  # type: ignore[no-untyped-def]
    k = min(k, scores.shape[1])
    rows = torch.from_numpy(scores)
    expected = torch.zeros_like(rows, dtype=torch.bool)
    expected.scatter_(1, rows.sort(dim=1, stable=True).indices[:, :k], True)
    assert torch.equal(smallest(rows, k), expected)


def test_large_groups_are_split_for_the_cache_without_a_seam() -> None:
    scores = torch.rand(300, 4096, generator=torch.Generator().manual_seed(0))
    mask = select(scores, NM(2, 4)).view(-1, 4)
    reference = torch.zeros_like(mask).scatter_(1, scores.view(-1, 4).sort(dim=1, stable=True).indices[:, :2], True)
    assert torch.equal(mask, reference)


def test_floor_is_of_a_float_product_and_exact_is_not() -> None:
    scores = torch.arange(100.0).view(1, 100)
    assert int(select(scores, Unstructured(0.29)).sum()) == 28
    assert int(select(scores, Unstructured(0.29), Comparison(count="exact")).sum()) == 29


def test_threshold_count_is_the_official_layer_rule() -> None:
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(0)).abs()
    mask = select(weight, Unstructured(0.5), Comparison("layer", 1, "threshold"))
    threshold = weight.flatten().sort().values[int(weight.numel() * 0.5)]
    assert torch.equal(mask, weight <= threshold)
    assert int(mask.sum()) == 3073


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    scores = torch.ones(2, 4)
    scores[1, 2] = bad
    with pytest.raises(PatternError, match="NaN or infinite"):
        select(scores, NM(2, 4))


def test_scores_whose_sum_overflows_are_fine() -> None:
    scores = torch.full((2, 4), 3e38)
    assert select(scores, NM(2, 4)).tolist() == [[True, True, False, False]] * 2


def test_a_width_that_m_does_not_divide_is_refused() -> None:
    with pytest.raises(PatternError, match="in_features 96 is not a multiple of 7"):
        select(torch.ones(2, 96), NM(3, 7))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_float_dtype(dtype: torch.dtype) -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 4.0]], dtype=dtype)
    assert select(scores, NM(2, 4)).tolist() == [[False, True, True, False]]
    assert select(scores, Unstructured(0.5)).tolist() == [[False, True, True, False]]


def test_holds_names_what_is_broken() -> None:
    weight = torch.tensor([[1.0, 0, 2, 0], [1, 1, 1, 0]])
    assert holds(weight[:1], NM(2, 4)) is None
    assert holds(weight, NM(2, 4)) == "1 of 2 groups keep more than 2 of 4"
    assert holds(weight, Unstructured(0.9)) is not None
    assert holds(torch.zeros(2, 4), Unstructured(0.9)) is None


def halved(zeros: tuple[int, int, int, int], columns: int = 8) -> torch.Tensor:
    """Four rows with so many zeros each."""
    weight = torch.ones(4, columns)
    for row, count in zip(weight, zeros, strict=True):
        row[:count] = 0
    return weight


@pytest.mark.parametrize("axis", ["output", "input"])
def test_holds_checks_every_comparison_group(axis: Axis) -> None:
    """All zeros in half of the rows are half of the matrix, and no half of each row."""
    pattern, comparison = Unstructured("0.5"), Comparison(axis)
    even, lopsided = halved((4, 4, 4, 4)), halved((8, 8, 0, 0))
    if axis == "input":
        even, lopsided = even.t().contiguous(), lopsided.t().contiguous()
    assert int((even == 0).sum()) == int((lopsided == 0).sum()) == 16
    assert holds(even, pattern, comparison) is None
    assert holds(lopsided, pattern, comparison) is not None
    assert holds(lopsided, pattern, Comparison("layer")) is None, "one group: where its zeros lie is its own affair"
    assert holds(lopsided, pattern, Comparison(axis, blocksize=4)) is None, "rows that are compared as one group"


@pytest.mark.parametrize("count", ["floor", "exact"])
def test_holds_at_the_boundary(count: Count) -> None:
    """Exactly enough zeros hold and more do; one fewer in one group of the four does not."""
    pattern, comparison = Unstructured("0.375"), Comparison("output", 1, count)
    assert holds(halved((3, 3, 3, 3)), pattern, comparison) is None
    assert holds(halved((3, 8, 3, 4)), pattern, comparison) is None
    for at in range(4):
        short = [3, 3, 3, 3]
        short[at] = 2
        assert holds(halved(tuple(short)), pattern, comparison) is not None  # type: ignore[arg-type]
    # What a group's own size does not take whole is rounded down, group by group.
    assert holds(halved((2, 2, 2, 2)), Unstructured("0.37"), comparison) is None
    assert holds(halved((2, 2, 1, 2)), Unstructured("0.37"), comparison) is not None


def test_holds_counts_the_smaller_group_at_the_end_by_its_own_size() -> None:
    """Three rows in twos: 8 of the first sixteen, 4 of the last eight."""
    pattern, comparison = Unstructured("0.5"), Comparison("output", 2)
    assert holds(halved((8, 0, 4, 0))[:3], pattern, comparison) is None
    assert holds(halved((8, 0, 3, 0))[:3], pattern, comparison) is not None
    assert holds(halved((7, 0, 4, 0))[:3], pattern, comparison) is not None


@settings(deadline=None, max_examples=100)
@given(
    st.integers(1, 7),
    st.integers(1, 24),
    shares,
    st.sampled_from(["output", "input", "layer"]),
    st.integers(1, 5),
    st.sampled_from(["floor", "exact", "threshold", "total"]),
    st.integers(0, 10**6),
)
def test_what_select_prunes_holds(rows, columns, pattern, axis, blocksize, count, seed) -> None:  # type: ignore[no-untyped-def]
    comparison = Comparison(axis, 1 if axis == "layer" else blocksize, count)
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) + 0.1
    assert holds(scores.masked_fill(select(scores, pattern, comparison), 0), pattern, comparison) is None


@settings(deadline=None, max_examples=100)
@given(
    st.integers(1, 7),
    st.integers(1, 24),
    shares,
    st.sampled_from(["output", "input", "layer"]),
    st.integers(1, 5),
    st.integers(0, 10**6),
)
def test_one_zero_too_few_anywhere_does_not_hold(rows, columns, pattern, axis, blocksize, seed) -> None:  # type: ignore[no-untyped-def]
    comparison = Comparison(axis, 1 if axis == "layer" else blocksize)
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) + 0.1
    weight = scores.masked_fill(select(scores, pattern, comparison), 0)
    for row, column in (weight == 0).nonzero().tolist():
        spoilt = weight.clone()
        spoilt[row, column] = 1
        assert holds(spoilt, pattern, comparison) is not None


@pytest.mark.parametrize("m", [2, 4, 8, 16])
def test_groups_that_keep_too_many_are_counted(m: int) -> None:
    torch.manual_seed(m)
    weight = torch.randn(6, 4 * m).masked_fill_(torch.rand(6, 4 * m) < 0.5, 0)
    kept = [sum(value != 0 for value in group) for group in weight.view(-1, m).tolist()]
    assert nm_most(weight, m) == max(kept)
    assert nm_broken(weight, NM(m // 2, m)) == sum(count > m // 2 for count in kept)
