"""Counts of zeros and masks, against loops over single numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsify.comparing import tensors
from sparsify.comparing.tensors import Overlap, overlap_of, same_bits, total, zeros_of

NUMBERS = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 3.0, 1e-30, -7.25])
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
PAIRS = st.lists(st.tuples(NUMBERS, NUMBERS), max_size=40)


def slowly(a: Tensor, b: Tensor) -> Overlap:
    """The same, a number at a time."""
    pairs = list(zip(a.double().flatten().tolist(), b.double().flatten().tolist(), strict=True))
    kept = [(one, other) for one, other in pairs if one != 0 and other != 0]
    return Overlap(
        len(pairs),
        sum(one == 0 for one, _ in pairs),
        sum(other == 0 for _, other in pairs),
        sum(one == 0 and other == 0 for one, other in pairs),
        math.fsum((other - one) ** 2 for one, other in kept),
        math.fsum(one**2 for one, _ in kept),
    )


@given(PAIRS, DTYPES, DTYPES, st.integers(1, 50))
@settings(max_examples=200, deadline=None)
def test_overlap(pairs: list[tuple[float, float]], first: torch.dtype, second: torch.dtype, at_once: int) -> None:
    a, b = (torch.tensor([pair[side] for pair in pairs]).to(dtype) for side, dtype in ((0, first), (1, second)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "_AT_ONCE", at_once)
        found, slow = overlap_of(a, b), slowly(a, b)
        assert zeros_of(a) == slow.zeros_a and zeros_of(b) == slow.zeros_b
    counts = ("numbers", "zeros_a", "zeros_b", "zeros_both")
    assert [getattr(found, name) for name in counts] == [getattr(slow, name) for name in counts]
    assert (found.moved, found.size) == pytest.approx((slow.moved, slow.size))
    zero_a, zero_b = ({at for at, pair in enumerate(zip(a, b, strict=True)) if pair[side] == 0} for side in (0, 1))
    either, both = {*range(len(a))} - (zero_a & zero_b), {*range(len(a))} - zero_a - zero_b
    assert found.zeros_shared == (len(zero_a & zero_b) / len(zero_a) if zero_a else None)
    assert found.kept_jaccard == (len(both) / len(either) if either else None)


@given(PAIRS, PAIRS)
@settings(deadline=None)
def test_overlaps_add_up(first: list[tuple[float, float]], second: list[tuple[float, float]]) -> None:
    def of(pairs: list[tuple[float, float]]) -> Overlap:
        return overlap_of(torch.tensor([one for one, _ in pairs]), torch.tensor([other for _, other in pairs]))

    added, whole = total([of(first), of(second)]), of([*first, *second])
    assert vars(added) == pytest.approx(vars(whole))


def test_numbers_that_are_none_move_by_no_number() -> None:
    a = torch.tensor([1.0, math.nan, 0.0, math.inf])
    found = overlap_of(a, a)
    assert (found.zeros_both, found.kept_jaccard, found.relative_move) == (1, 1.0, None)
    assert overlap_of(torch.zeros(3), torch.ones(3)).relative_move is None
    moved = overlap_of(torch.tensor([3.0, 4.0, 9.0]), torch.tensor([3.0, 5.0, 0.0])).relative_move
    assert moved == pytest.approx(1 / 5)


def test_the_same_to_the_bit() -> None:
    a = torch.tensor([[0.0, math.nan], [1.0, 2.0]])
    assert same_bits(a, a.clone()) and not same_bits(a, a.view(4)) and not same_bits(a, a.double())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0])) and same_bits(a.t(), a.t().contiguous())
    assert same_bits(torch.tensor(3), torch.tensor(3)) and same_bits(torch.zeros(0), torch.zeros(0))
