"""Passes that rank weights by S = |W| · M, with M from statistics, and may then move the weights they keep.

Source of the updates: the ablations of the Wanda paper (2306.11695, table 8); algorithms.md, section 6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from sparsify.method.pattern import NM
from sparsify.method.selection import Comparison, select
from sparsify.method.statistics import InputStatistics
from sparsify.method.weight_pass import Pruned
from sparsify.passes.solvers.fitting import FittingPass, Method, Problem, adaptive
from sparsify.tensors import zeroed

Update = Literal["none", "sequential", "iterative", "block", "exact"]

_METHODS: dict[str, Method] = {"sequential": "sweep", "block": "block", "exact": "exact"}
_BLOCK = 128


@dataclass(frozen=True)
class ScoredPass(FittingPass):
    """Base of magnitude, Wanda and their like.

    Args:
        update: what becomes of the weights that stay: ``none``, nothing; ``sequential``, SparseGPT's sweep under the
            method's own mask; ``iterative``, the same sweep, the mask chosen on the way by the method's score of the
            weights as they are then (within 128 columns, or each group of N:M); ``block`` and ``exact``, APT's joint
            updates.
    """

    update: Update = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.update == "none":
            options = ("percdamp", "target", "blend", "solver", "dead")
            self._unused(options, "update=none leaves the kept weights as they are")
        elif self.update != "exact":
            self._unused(("solver",), f"it solves update=exact, and update={self.update} is none")
        if self.update == "iterative":
            self._unused(("group", "blocksize"), f"update=iterative compares within {_BLOCK} columns of all rows")

    @property
    def keeps_weights(self) -> bool:
        return self.update == "none"

    @property
    def by_rows(self) -> bool:
        return self.compares_rows_alone and (self.update != "iterative" or isinstance(self.pattern, NM))

    @property
    def statistics(self) -> tuple[str, ...]:
        return self.scored if self.update == "none" else (*dict.fromkeys((*self.scored, *self.fitted)),)

    @property
    def counted(self) -> Comparison:
        return Comparison("input", _BLOCK, self.count) if self.update == "iterative" else self.comparison

    @property
    def scored(self) -> tuple[str, ...]:
        """The statistics that the score needs."""
        return ()

    def multiplier(self, statistics: InputStatistics) -> Tensor | None:
        """M, float32 [in_features] or [out_features, in_features]; None for one."""
        raise NotImplementedError

    def scores(self, weight: Tensor, statistics: InputStatistics) -> Tensor:
        """S = |W| · M, [out_features, in_features]: |W| in the weight's dtype, M in float32."""
        multiplier = self.multiplier(statistics)
        if multiplier is None:
            return weight.abs()
        # In place where |W| already has the dtype of the product.
        return weight.abs().mul_(multiplier) if weight.dtype == multiplier.dtype else weight.abs() * multiplier

    def choose(self, weight: Tensor, statistics: InputStatistics, problem: Problem) -> Tensor:
        return self.mask(weight, statistics)

    def mask(self, weight: Tensor, statistics: InputStatistics) -> Tensor:
        """The mask by the method's own score and comparison group, [out_features, in_features]."""
        return select(self.scores(weight, statistics), self.pattern, self.comparison)

    def prune(self, weight: Tensor, statistics: InputStatistics) -> Pruned:
        if self.update == "none":
            mask = self.mask(weight, statistics)
            return Pruned(zeroed(weight, mask), mask)
        problem = self._problem(weight, statistics)
        if self.update == "iterative":
            multiplier = self.multiplier(statistics)

            def scores(columns: Tensor, start: int) -> Tensor:
                if multiplier is None:
                    return columns.abs()
                part = multiplier[..., start : start + len(columns)]
                return columns.abs() * (part.unsqueeze(1) if part.dim() == 1 else part.t())

            choose, width = adaptive(self.pattern, self.count, _BLOCK, scores)
            swept, mask = problem.swept(choose, width)
            return problem.finished(swept, mask)
        mask = self.mask(weight, statistics)
        return problem.finished(problem.solved(mask, _METHODS[self.update], self.solver), mask)
