"""SparseGPT: the mask chosen column by column on weights that compensate for what was pruned before.

Source: Frantar, Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot" (2301.00774),
algorithm 1; algorithms.md, section 5. Unlike the official code, groups of N:M never restart inside a block, a Gram
matrix that does not factor raises the damping and says so, and ``count=floor`` is the default (``threshold`` is the
official rule, one weight more per block).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from sparsify.method.selection import Axis
from sparsify.method.statistics import InputStatistics
from sparsify.method.weight_pass import Pruned
from sparsify.passes.solvers.fitting import FittingPass, Problem, adaptive


@dataclass(frozen=True)
class SparseGPT(FittingPass):
    """Prune by w_j² / U_jj² = (w_j·M_jj)² inside the sweep; unstructured patterns compare all weights of
    ``blocksize`` columns.

    Args:
        compensation: how the kept weights move: by the ``sweep`` itself, or, once the sweep has chosen the mask, by a
            joint update ``block`` by block or ``exact``.
        blocksize: columns that are compared with one another and swept together.

    >>> from sparsify.method.spec import parse_pass, spec_text
    >>> spec_text(parse_pass("sparsegpt:2:4,compensation=exact"))
    'sparsegpt:2:4,compensation=exact'
    """

    blocksize: int = 128
    compensation: Literal["sweep", "block", "exact"] = "sweep"

    name: ClassVar[str] = "sparsegpt"
    summary: ClassVar[str] = "optimal brain surgeon, column by column, with update; one forward and a Gram matrix"
    when: ClassVar[str] = "for better quality than wanda at a few times its cost"
    example: ClassVar[str] = "sparsegpt:2:4"
    default_group: ClassVar[Axis] = "input"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._unused(("group",), "the sweep compares blocks of columns")
        if self.compensation != "exact":
            self._unused(("solver",), f"it solves compensation=exact, and this is {self.compensation}")

    @property
    def statistics(self) -> tuple[str, ...]:
        return self.fitted

    def prune(self, weight: Tensor, statistics: InputStatistics) -> Pruned:
        problem = self._problem(weight, statistics)
        swept, mask = self.sweep(problem)
        if self.compensation != "sweep":
            swept = problem.solved(mask, self.compensation, self.solver, start=swept)
        return problem.finished(swept, mask)

    def choose(self, weight: Tensor, statistics: InputStatistics, problem: Problem) -> Tensor:
        return self.sweep(problem)[1]

    def sweep(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """The sweep with its adaptive mask: the new weight and the mask, [out_features, in_features]."""
        # 1 / U_jj² of the paper is M_jj².
        scale = problem.gram.root.diagonal().square().unsqueeze(1)

        def scores(columns: Tensor, start: int) -> Tensor:
            return columns.square() * scale[start : start + len(columns)]

        return problem.swept(*adaptive(self.pattern, self.count, self.blocksize, scores))
