"""Two tensors of one name: which numbers are zero in one and in both, and how far the others moved."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# Numbers that are looked at at once: what is computed beside two tensors stays in a core's cache.
_AT_ONCE = 1 << 17


@dataclass(frozen=True)
class Overlap:
    """Counts over numbers that two models both have; they add up.

    Attributes:
        numbers: how many. zeros_a, zeros_b, zeros_both: how many are zero in A, in B, in both.
        moved, size: over numbers that are zero in neither, Σ(b−a)² and Σa².
    """

    numbers: int = 0
    zeros_a: int = 0
    zeros_b: int = 0
    zeros_both: int = 0
    moved: float = 0.0
    size: float = 0.0

    def __add__(self, other: Overlap) -> Overlap:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Overlap(*(one + another for one, another in pairs))

    @property
    def zeros_shared(self) -> float | None:
        """Of A's zeros the share that is zero in B; None where A has none."""
        return self.zeros_both / self.zeros_a if self.zeros_a else None

    @property
    def kept_jaccard(self) -> float | None:
        """Numbers that both keep over numbers that either keeps; None where both are all zeros."""
        either = self.numbers - self.zeros_both
        both = self.numbers - self.zeros_a - self.zeros_b + self.zeros_both
        return both / either if either else None

    @property
    def relative_move(self) -> float | None:
        """‖b−a‖/‖a‖ over what both keep; None where that is nothing or no number."""
        if not (self.size and math.isfinite(self.moved) and math.isfinite(self.size)):
            return None
        return math.sqrt(self.moved / self.size)


def total(overlaps: Iterable[Overlap]) -> Overlap:
    return sum(overlaps, Overlap())


def overlap_of(a: Tensor, b: Tensor) -> Overlap:
    """Of two tensors of floating-point numbers of one shape, whatever their dtypes; NaN is not zero."""
    found = Overlap()
    for one, other in zip(_pieces(a), _pieces(b), strict=True):
        zero_a, zero_b = one == 0, other == 0
        nothing = zero_a | zero_b
        here, there = one.masked_fill(nothing, 0), other.masked_fill(nothing, 0)
        count_a, count_b, either = int(zero_a.sum()), int(zero_b.sum()), int(nothing.sum())
        both = count_a + count_b - either
        found += Overlap(one.numel(), count_a, count_b, both, _squares(there - here), _squares(here))
    return found


def _squares(piece: Tensor) -> float:
    """Their sum, in double precision."""
    return float(torch.linalg.vector_norm(piece, dtype=torch.float64)) ** 2


def zeros_of(tensor: Tensor) -> int:
    """How many of its numbers are zero; -0.0 is."""
    return sum(int((piece == 0).sum()) for piece in _pieces(tensor))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether shape, dtype and every byte are the same: NaN equals itself, 0.0 does not equal -0.0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def _pieces(tensor: Tensor) -> Iterable[Tensor]:
    """Its numbers in order, in a dtype that subtracts without rounding much."""
    wide = torch.float32 if tensor.dtype.itemsize < 4 else tensor.dtype
    for piece in tensor.contiguous().view(-1).split(_AT_ONCE):
        yield piece.to(wide)
