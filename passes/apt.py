"""APT: the optimal removal of several weights at once, for transformers and Mamba.

Source: Zhao et al., "Pruning Foundation Models for High Accuracy without Retraining" (2410.15567), the multiple removal
problem; algorithms.md, section 8. Its official code was never published: what the abstract leaves open is an
option here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sparsify.errors import PatternError, SpecError
from sparsify.method.pattern import NM
from sparsify.method.registry import find
from sparsify.method.selection import Comparison, falls_short, holds, select
from sparsify.method.statistics import InputStatistics
from sparsify.method.weight_pass import Pruned, WeightPass
from sparsify.passes.solvers.fitting import FittingPass, Problem
from sparsify.passes.solvers.gram import DampedGram

# Weights whose losses are compared at once.
_WEIGHTS = 1 << 24


@dataclass(frozen=True)
class MaskedPass(FittingPass):
    """Base of passes that take their mask from a method named by an option, and then fit the kept weights.

    Args:
        mask: whose mask: ``S`` ranks by w_j² / [H⁻¹]_jj, the loss of removing one weight; ``M`` takes, in each group of
            N:M, the candidates whose joint removal loses least, ½ w_P ([H⁻¹]_PP)⁻¹ w_Pᵀ; ``zeros`` keeps the zeros that
            an earlier pass made, and takes W from the model as it was given; any other name is a pass whose mask is
            used (``wanda``, ``sparsegpt``, …).
    """

    mask: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._mask == "M" and not isinstance(self.pattern, NM):
            raise self._refuse("mask=M", "it tries all candidates of a group of N:M", "Use mask=S for a percentage")
        # An unknown name is an error now, not at the first site.
        self._other_pass()

    @property
    def _mask(self) -> str:
        return self.mask or self._default_mask

    @property
    def _default_mask(self) -> str:
        return "M" if isinstance(self.pattern, NM) else "S"

    @cached_property
    def _chooser(self) -> WeightPass | None:
        return self._other_pass()

    @property
    def counted(self) -> Comparison:
        return self.comparison if self._chooser is None else self._chooser.counted

    @property
    def exact_counts(self) -> bool:
        # Zeros that were given may lie in any groups.
        return self._mask != "zeros" and (self._chooser is None or self._chooser.exact_counts)

    def _other_pass(self) -> WeightPass | None:
        """The pass that ``mask`` names; None where it names none."""
        if self._mask in ("S", "M", "zeros"):
            return None
        kind = find("sparsify.passes", self._mask)
        if issubclass(kind, MaskedPass):
            raise self._refuse(f"mask={self._mask}", "that pass takes its mask from another", "Name S, M or wanda, say")
        options = {name: getattr(self, name) for name in ("group", "blocksize", "count") if self._given(name)}
        try:
            found: WeightPass = kind(self.pattern, **options)
        except SpecError as error:
            raise self._refuse(f"mask={self._mask}", error.found, error.do) from error
        return found

    @property
    def by_rows(self) -> bool:
        if self._chooser is not None:
            return self._chooser.by_rows
        # Of zeros that were given a percentage holds of the whole matrix alone.
        return isinstance(self.pattern, NM) or (self.compares_rows_alone and self._mask != "zeros")

    @property
    def statistics(self) -> tuple[str, ...]:
        own = () if self._chooser is None else self._chooser.statistics
        given = ("dense_weight",) if self._mask == "zeros" else ()
        return (*dict.fromkeys((*own, *self.fitted, *given)),)

    def choose(self, weight: Tensor, statistics: InputStatistics, problem: Problem) -> Tensor:
        """The mask for ``weight`` [out_features, in_features]."""
        if self._mask == "zeros":
            return self._zeros(problem.weight)
        if isinstance(self._chooser, FittingPass):
            return self._chooser.choose(weight, statistics, problem)
        if self._chooser is not None:
            return self._chooser.prune(weight, statistics).mask
        if self._mask == "M" and isinstance(self.pattern, NM):
            return multiple_removal_mask(weight.float().masked_fill(problem.gram.dead, 0), problem.gram, self.pattern)
        scores = weight.float().masked_fill(problem.gram.dead, 0).square() / problem.gram.inverse_diagonal
        return select(scores, self.pattern, self.comparison)

    def _zeros(self, weight: Tensor) -> Tensor:
        """The zeros of ``weight``, which must have the pattern."""
        pattern = self.pattern
        # Which weights an earlier pass compared is not known.
        broken = holds(weight, pattern) if isinstance(pattern, NM) else falls_short(weight, pattern)
        if broken:
            raise PatternError(
                f"{self.name}:{self.pattern},mask=zeros",
                found=broken,
                do=f"Prune before it: --pass wanda:{self.pattern} --pass {self.name}:{self.pattern},mask=zeros",
            )
        return weight == 0


@dataclass(frozen=True)
class APT(MaskedPass):
    """Prune by the loss of removal, then move the kept weights to their optimum.

    Args:
        compensation: how the kept weights move: ``exact`` is the optimum for the mask; ``block`` that of 128 columns at
            a time, those to the left frozen; ``sweep`` one column at a time, as SparseGPT; ``none``.
        mask: whose mask: ``S`` by the loss of removing one weight, ``M`` by that of removing several of an N:M group
            together, ``zeros`` of the pass before, or another pass's by its name; S for a percentage, M for N:M.
    """

    compensation: Literal["none", "sweep", "block", "exact"] = "exact"

    name: ClassVar[str] = "apt"
    summary: ClassVar[str] = "joint removal of several weights and the optimal update; one forward and a Gram matrix"
    when: ClassVar[str] = "to give a mask of your choice its optimal weights: apt:2:4,mask=wanda"
    example: ClassVar[str] = "apt:2:4,mask=M"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compensation != "exact":
            self._unused(("solver",), f"it solves compensation=exact, and this is {self.compensation}")
        if self.compensation == "none":
            self._unused(("target",), "compensation=none moves no weight")

    @property
    def keeps_weights(self) -> bool:
        return False  # dead inputs are zeroed even by compensation=none

    def prune(self, weight: Tensor, statistics: InputStatistics) -> Pruned:
        problem = self._problem(weight, statistics)
        mask = self.choose(weight, statistics, problem)
        return problem.finished(problem.solved(mask, self.compensation, self.solver), mask)


def multiple_removal_mask(weight: Tensor, gram: DampedGram, pattern: NM) -> Tensor:
    """The M solution: of each group of M inputs the M − N whose joint removal loses least.

    Args:
        weight: [out_features, in_features] float32.
    """
    rows, columns = weight.shape
    size, drop = pattern.m, pattern.m - pattern.n
    if columns % size:
        select(weight, pattern)  # raises the error that says so
    groups = columns // size
    # Blocks of H⁻¹ = UᵀU on the diagonal: [groups, M, M].
    parts = gram.inverse_root.view(columns, groups, size)
    inverse = torch.einsum("kgi,kgj->gij", parts, parts).double()
    candidates = [list(c) for c in combinations(range(size), drop)]
    mask = torch.empty(rows, groups, size, dtype=torch.bool, device=weight.device)
    table = torch.zeros(len(candidates), size, dtype=torch.bool, device=weight.device)
    for number, chosen in enumerate(candidates):
        table[number, chosen] = True
    losses = torch.stack([torch.linalg.inv(inverse[:, c][:, :, c]) for c in candidates]).float()
    for index in torch.arange(rows, device=weight.device).split(max(1, _WEIGHTS // columns)):
        part = weight[index].view(len(index), groups, size)
        best = torch.full((len(index), groups), torch.inf, device=weight.device)
        choice = torch.zeros(len(index), groups, dtype=torch.long, device=weight.device)
        for number, chosen in enumerate(candidates):
            gone = part[:, :, chosen]
            loss = torch.einsum("rgi,gij,rgj->rg", gone, losses[number], gone)
            better = loss < best
            best = torch.where(better, loss, best)
            choice[better] = number
        mask[index] = table[choice]
    return mask.view(rows, columns)
