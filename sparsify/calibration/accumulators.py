"""What is recorded about the input of a linear site, in float32 per batch and float64 across batches.

A pass names the statistics that it wants; the engine feeds each batch's rows and hands the results over. All rows
are [tokens, in_features], padding already taken out. For a stack of experts every statistic is kept per expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Accumulator(Protocol):
    """A statistic under construction for [experts] inputs of one width."""

    def __init__(self, experts: int, features: int, device: torch.device) -> None: ...

    def update(self, expert: int, rows: Tensor, dense: Tensor) -> None: ...

    def value(self, expert: int, sequences: int) -> Tensor: ...


class _Vector:
    """One float64 number per input feature, summed over tokens."""

    def __init__(self, experts: int, features: int, device: torch.device) -> None:
        # float64 adds nothing to the cost of one vector per batch; the MPS device has none.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.total = torch.zeros(experts, features, dtype=dtype, device=device)

    def update(self, expert: int, rows: Tensor, dense: Tensor) -> None:
        self.total[expert] += self.of(rows.float())

    def of(self, rows: Tensor) -> Tensor:
        raise NotImplementedError

    def value(self, expert: int, sequences: int) -> Tensor:
        return self.total[expert] / sequences


class SquaredNorm(_Vector):
    """Sum of squares of each input feature."""

    def of(self, rows: Tensor) -> Tensor:
        return rows.square().sum(dim=0)


class AbsoluteSum(_Vector):
    """Sum of absolute values of each input feature."""

    def of(self, rows: Tensor) -> Tensor:
        return rows.abs().sum(dim=0)


class Sum(_Vector):
    """Sum of each input feature."""

    def of(self, rows: Tensor) -> Tensor:
        return rows.sum(dim=0)


class AbsoluteMax(_Vector):
    """Largest absolute value of each input feature."""

    def update(self, expert: int, rows: Tensor, dense: Tensor) -> None:
        self.total[expert] = torch.maximum(self.total[expert], rows.float().abs().amax(dim=0).to(self.total))

    def value(self, expert: int, sequences: int) -> Tensor:
        return self.total[expert]


class Gram:
    """XᵀX in float32. Only the blocks on and above the diagonal are computed: 5/8 of the products."""

    BLOCKS, LEAST = 4, 64

    def __init__(self, experts: int, features: int, device: torch.device) -> None:
        self.features, self.device = features, device
        self._sums: dict[int, Tensor] = {}  # an expert that sees no token costs nothing

    def update(self, expert: int, rows: Tensor, dense: Tensor) -> None:
        total = self._of(expert)
        rows = rows.float()
        size = max(self.LEAST, -(-self.features // self.BLOCKS))
        for start in range(0, self.features, size):
            total[start : start + size, start:].addmm_(rows[:, start : start + size].t(), rows[:, start:])

    def value(self, expert: int, sequences: int) -> Tensor:
        total = self._of(expert).triu_()
        total += total.triu(1).t()
        return total / sequences

    def _of(self, expert: int) -> Tensor:
        if expert not in self._sums:
            size = (self.features, self.features)
            self._sums[expert] = torch.zeros(size, dtype=torch.float32, device=self.device)
        return self._sums[expert]


class CrossGram(Gram):
    """X₀ᵀX in float32: the same input in the dense and in the pruned model."""

    def update(self, expert: int, rows: Tensor, dense: Tensor) -> None:
        self._of(expert).addmm_(dense.float().t(), rows.float())

    def value(self, expert: int, sequences: int) -> Tensor:
        return self._of(expert) / sequences


ACCUMULATORS: dict[str, type[Accumulator]] = {
    "squared_norm": SquaredNorm,
    "absolute_sum": AbsoluteSum,
    "absolute_max": AbsoluteMax,
    "sum": Sum,
    "gram": Gram,
    "cross_gram": CrossGram,
}
# Not of the input but of the weight: made by a backward sweep, not by the recorder.
GRADIENTS = frozenset({"gradient_l1", "gradient_l2", "gradient_platon", "gradient"})
# What only the model as it was given can tell.
DENSE = frozenset({"cross_gram", "dense_weight"})
# Of one site's output: recorded by a product with its weight.
OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "output_absolute": lambda y: y.abs().sum(dim=0),
    "output_sum": lambda y: y.sum(dim=0),
    "output_square": lambda y: y.square().sum(dim=0),
    "output_gram": lambda y: y.t() @ y,
}
