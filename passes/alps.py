"""ALPS: the mask by the alternating direction method of multipliers, then the kept weights at their optimum.

Source: Meng, Behdin, Wang, Mazumder, "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large
Language Models" (2406.07831), section 3. The problem min (W − W*) H (W − W*)ᵀ with W under the pattern is split into a
W that is free and a D that obeys; a growing penalty ρ draws them together. As there, inputs are first scaled so that
H has a unit diagonal. Here ρ grows geometrically, and the final solve is :mod:`sparsify.passes.solvers.exact`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsify.method.pattern import Pattern
from sparsify.method.selection import Comparison, select
from sparsify.method.statistics import InputStatistics
from sparsify.method.weight_pass import Pruned
from sparsify.passes.solvers.fitting import FittingPass, Problem
from sparsify.tensors import zeroed

# ρ relative to the unit diagonal: chosen on stories260k and pycode-6m (docs/benchmarks.md), where twice as many steps
# gain less than 2% of the objective.
_FIRST, _GROWTH, _ROUNDS, _STEPS = 0.1, 1.5, 7, 3


@dataclass(frozen=True)
class ALPS(FittingPass):
    """Prune by the mask that ADMM settles on; kept weights are the optimum for it.

    >>> from sparsify.method.spec import parse_pass, spec_text
    >>> spec_text(parse_pass("alps:2:4,solver=cg"))
    'alps:2:4,solver=cg'
    """

    name: ClassVar[str] = "alps"
    summary: ClassVar[str] = "mask by ADMM and the optimal update; one forward and a Gram matrix"
    when: ClassVar[str] = "for high sparsity (60% and more) where twin's second forward is too much"
    example: ClassVar[str] = "alps:70%"

    @property
    def statistics(self) -> tuple[str, ...]:
        return self.fitted

    def prune(self, weight: Tensor, statistics: InputStatistics) -> Pruned:
        problem = self._problem(weight, statistics)
        mask = self.choose(weight, statistics, problem)
        return problem.finished(problem.solved(mask, "exact", self.solver), mask)

    def choose(self, weight: Tensor, statistics: InputStatistics, problem: Problem) -> Tensor:
        return alps_mask(problem.goal, problem.gram.matrix, self.pattern, self.comparison)


def alps_mask(goal: Tensor, gram: Tensor, pattern: Pattern, comparison: Comparison) -> Tensor:
    """The mask of D after ADMM.

    Args:
        goal: [out_features, in_features]. ``gram``: H, damped.
    """
    scale = gram.diagonal().sqrt()
    scaled = gram / scale.unsqueeze(1) / scale
    goal = goal * scale
    right = goal @ scaled
    obeying, dual, penalty = goal, torch.zeros_like(goal), _FIRST
    mask = torch.zeros_like(goal, dtype=torch.bool)
    for _ in range(_ROUNDS):
        ridge = scaled.clone()
        ridge.diagonal().add_(penalty)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(ridge))
        for _ in range(_STEPS):
            free = (right - dual + penalty * obeying) @ inverse
            shifted = free + dual / penalty
            mask = select(shifted.abs(), pattern, comparison)
            obeying = zeroed(shifted, mask)
            dual += penalty * (free - obeying)
        penalty *= _GROWTH
    return mask
