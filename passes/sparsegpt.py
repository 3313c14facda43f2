"""SparseGPT: the mask chosen column by column on weights that compensate for what was pruned before.

Source: Frantar, Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot" (2301.00774),
algorithm 1; algorithms.md, section 5. Unlike the official code, groups of N:M never restart inside a block, a Gram
matrix that does not factor raises the damping and says so, and ``count=floor`` is the default (``threshold`` is the
official rule, one weight more per block). With ``bits`` the same sweep rounds what it keeps (the paper's section on
joint sparsification and quantization; algorithms.md, section 5.3), by scales that float16 holds too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sparsify.method.base import Kind
from sparsify.method.grids.finding import integers
from sparsify.method.grids.fitting import fit, unfit_dtype
from sparsify.method.pattern import NM, Grid
from sparsify.method.selection import Axis
from sparsify.method.statistics import InputStatistics
from sparsify.method.weight_pass import Pruned
from sparsify.passes.solvers.fitting import FittingPass, Problem, adaptive
from sparsify.passes.solvers.sweep import Settler

# Bits of a weight that is not rounded, whatever its dtype has.
_FULL = 16


@dataclass(frozen=True)
class SparseGPT(FittingPass):
    """Prune by w_j² / U_jj² = (w_j·M_jj)² inside the sweep; unstructured patterns compare all weights of
    ``blocksize`` columns.

    Args:
        compensation: how the kept weights move: by the ``sweep`` itself, or, once the sweep has chosen the mask, by a
            joint update ``block`` by block or ``exact``.
        blocksize: columns that are compared with one another and swept together.
        bits: with 8, 4 or 3 the kept weights are rounded in the same sweep, to 2^bits values for each output neuron,
            their scale from its largest dense weights. ``sparsegpt`` and then ``round`` loses less.
        symmetric: of ``bits``: integers on both sides of zero, which can be packed; false gives each output
            neuron a zero point, as the paper's code does.

    >>> from sparsify.method.spec import parse_pass, spec_text
    >>> spec_text(parse_pass("sparsegpt:2:4,compensation=exact"))
    'sparsegpt:2:4,compensation=exact'
    """

    blocksize: int = 128
    compensation: Literal["sweep", "block", "exact"] = "sweep"
    bits: int = _FULL
    symmetric: bool = True

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
        if self.bits == _FULL:
            self._unused(("symmetric",), "it says how bits= rounds, and nothing is rounded")
            return
        if self.bits not in (8, 4, 3):
            raise self._refuse(f"bits={self.bits}", "8, 4 and 3 are what there is", "Take bits=4, or leave bits out")
        why = "what moves weights after the sweep takes them off their grid"
        for option in ("compensation", "dead"):
            if self._given(option):
                raise self._refuse(
                    f"bits={self.bits},{option}={getattr(self, option)}",
                    why,
                    f"Leave {option} out, or round afterwards",
                )

    @property
    def leaves(self) -> Kind:
        return self.kind if self.grid is None else "rounding"

    @property
    def grid(self) -> Grid | None:
        """What kept weights are rounded to; None where they are not."""
        return None if self.bits == _FULL else Grid(self.bits)

    @property
    def zero_points(self) -> int | None:
        return None if self.symmetric else self.bits

    @property
    def by_rows(self) -> bool:
        # The sweep of a percentage compares all rows of a block of columns.
        return isinstance(self.pattern, NM)

    @property
    def statistics(self) -> tuple[str, ...]:
        return self.fitted

    def prune(self, weight: Tensor, statistics: InputStatistics) -> Pruned:
        problem = self._problem(weight, statistics)
        swept, mask = self.sweep(problem)
        if self.compensation != "sweep":
            swept = problem.solved(mask, self.compensation, self.solver, start=swept)
        return problem.finished(swept, mask)

    def broken(self, weight: Tensor) -> str | None:
        if self.grid is not None and integers(weight, self.grid, weight.shape[1], symmetric=self.symmetric) is None:
            return f"values off a grid of {self.grid}"
        return super().broken(weight)

    def choose(self, weight: Tensor, statistics: InputStatistics, problem: Problem) -> Tensor:
        return self.sweep(problem)[1]

    def sweep(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """The sweep with its adaptive mask: the new weight and the mask, [out_features, in_features]."""
        # 1 / U_jj² of the paper is M_jj².
        scale = problem.gram.root.diagonal().square().unsqueeze(1)

        def scores(columns: Tensor, start: int) -> Tensor:
            return columns.square() * scale[start : start + len(columns)]

        return problem.swept(*adaptive(self.pattern, self.count, self.blocksize, scores), self._settler(problem))

    def _settler(self, problem: Problem) -> Settler | None:
        """What rounds a column once it is at its optimum; None where nothing is rounded."""
        if self.grid is None:
            return None
        dtype = problem.weight.dtype
        if (found := unfit_dtype(self.grid, dtype, symmetric=self.symmetric)) is not None:
            asked = f"bits={self.bits},symmetric=false"
            do = "Leave symmetric out, or prune a model that is stored in float32"
            raise self._refuse(asked, found, do)
        ones = torch.ones(1, device=problem.goal.device)
        rows = fit(problem.goal, self.grid, dtype, symmetric=self.symmetric, scale="minmax", weights=ones).of_columns()

        def settle(column: Tensor, _: int) -> None:
            column.copy_(rows.rounded(column))

        return settle
