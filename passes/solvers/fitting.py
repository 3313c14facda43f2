"""What passes that move the kept weights share: the problem they solve, and the four ways of solving it.

With P the input of a site in the model pruned so far, X the same input in the dense model and W its weight, the
outputs to fit are (a·X + (1 − a)·P) Wᵀ, with a = 0 for ``target=pruned`` (the published methods). The objective
‖P Ŵᵀ − (a·X + (1 − a)·P) Wᵀ‖² + λ‖Ŵ − W‖² is, up to a constant, (Ŵ − W*) H (Ŵ − W*)ᵀ summed over rows, where
H = PᵀP + λI and W* = W + a·W (XᵀP − PᵀP) H⁻¹ is its minimum without a mask, called the goal. Every method below
prunes the goal under H, so each of them serves both targets.

Source: algorithms.md, sections 5, 6 and 8; known from quantisation as asymmetric calibration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from sparsify.errors import CalibrationError
from sparsify.method.pattern import NM, Pattern
from sparsify.method.selection import Comparison, Count, lowest, select, smallest
from sparsify.method.statistics import InputStatistics
from sparsify.method.weight_pass import Pruned, WeightPass
from sparsify.passes.solvers.exact import Solver, conjugate_gradients, solve_rows
from sparsify.passes.solvers.gram import DampedGram, damped_gram
from sparsify.passes.solvers.sweep import Chooser, Settler, block_update, sweep
from sparsify.tensors import all_finite, zeroed

FitTarget = Literal["pruned", "dense"]
Method = Literal["none", "sweep", "block", "exact"]

# Past this, one factorisation per output neuron costs more than conjugate gradients (docs/benchmarks.md).
_CHOLESKY_UP_TO = 256


@dataclass(frozen=True)
class FittingPass(WeightPass):
    """Base of passes that may move the weights they keep.

    Args:
        percdamp: damping of the Gram matrix, as a share of the mean of its diagonal.
        target: fit the outputs of the model as ``pruned`` so far, or of the ``dense`` model, which needs a second
            forward.
        blend: for ``target=dense``: how far from the pruned model's outputs (0) to the dense one's (1).
        solver: for exact solutions: ``cholesky`` (a factorisation per output neuron), ``cg`` (conjugate gradients on
            all of them at once), or ``auto``, whichever is cheaper for the width.
        dead: what becomes of the weights of inputs that are zero on every token: ``zero`` prunes them all, as
            SparseGPT does; ``keep`` leaves those that the mask keeps as they were.
    """

    percdamp: float = 0.01
    target: FitTarget = "pruned"
    blend: float = 0.5
    solver: Solver = "auto"
    dead: Literal["zero", "keep"] = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.percdamp <= 100:
            raise self._refuse(f"percdamp={self.percdamp:g}", "damping is a share of the diagonal", "Choose 0.01, say")
        if not 0 < self.blend <= 1:
            raise self._refuse(f"blend={self.blend:g}", "it must lie in (0, 1]", "Choose 0.5, or target=pruned for 0")
        if self.target == "pruned":
            self._unused(("blend",), "it weighs the dense model's inputs, and target=pruned uses none")

    @property
    def keeps_weights(self) -> bool:
        return False

    @property
    def fitted(self) -> tuple[str, ...]:
        """The statistics that the problem needs."""
        own = ("squared_norm", "gram")
        return (*own, "cross_gram", "dense_weight") if self.target == "dense" else own

    def choose(self, weight: Tensor, statistics: InputStatistics, problem: Problem) -> Tensor:
        """This method's mask for ``weight`` [out_features, in_features], the kept weights left aside."""
        raise NotImplementedError

    def refit(self, weight: Tensor, statistics: InputStatistics, mask: Tensor, method: Method = "exact") -> Pruned:
        """Prune ``weight`` by a mask given from outside, moving the kept weights by ``method``.

        Args:
            weight, mask: [out_features, in_features], True where a weight goes.
        """
        problem = self._problem(weight, statistics)
        return problem.finished(problem.solved(mask, method, self.solver), mask)

    def _problem(self, weight: Tensor, statistics: InputStatistics) -> Problem:
        gram = damped_gram(statistics, self.percdamp)
        # After earlier passes ``weight`` is no longer the dense model's.
        goal = statistics.values.get("dense_weight", weight).float()
        if self.target == "dense":
            goal = goal + self.blend * (
                goal @ statistics.once(("drift", self.percdamp), lambda: _drift(statistics, gram))
            )
        if gram.dead.any():
            goal = goal.masked_fill(gram.dead, 0)
        return Problem(weight, goal, gram, self.dead == "keep")


@dataclass(frozen=True)
class Problem:
    """One matrix to be pruned: ``weight`` W, ``goal`` W* (zero at dead inputs), both [out_features, in_features]; H."""

    weight: Tensor
    goal: Tensor
    gram: DampedGram
    keep_dead: bool

    def swept(self, choose: Chooser | Tensor, width: int, settle: Settler | None = None) -> tuple[Tensor, Tensor]:
        return sweep(self.goal, self.gram.root, choose, width, settle)

    def solved(self, mask: Tensor, method: Method, solver: Solver = "auto", start: Tensor | None = None) -> Tensor:
        """The kept weights under ``mask``; ``start`` is a sweep's result for it, where there is one already."""
        if method == "none":
            return zeroed(self.goal, mask)
        if method == "block":
            return block_update(self.goal, self.gram.inverse_root, mask)
        if method == "exact" and (solver == "cholesky" or (solver == "auto" and mask.shape[1] <= _CHOLESKY_UP_TO)):
            return solve_rows(self.goal, self.gram.matrix, mask).float()
        if start is None:
            start, _ = self.swept(mask, mask.shape[1])
        return start if method == "sweep" else conjugate_gradients(self.goal, self.gram.matrix, mask, start)

    def finished(self, weight: Tensor, mask: Tensor) -> Pruned:
        """``weight``, zero under ``mask``, in the dtype of W; dead inputs as asked."""
        dead = self.gram.dead
        if dead.any():
            if self.keep_dead:
                weight = zeroed(weight.where(~dead, self.weight.float()), mask)
            else:
                mask = mask | dead
        notes = () if self.gram.note is None else (self.gram.note,)
        result = weight.to(self.weight.dtype).contiguous()
        if not all_finite(result):
            raise CalibrationError(
                "the updated weight",
                found=f"values past what {result.dtype} holds",
                do="Raise percdamp, or prune without an update",
            )
        return Pruned(result, mask, notes)


def _drift(statistics: InputStatistics, gram: DampedGram) -> Tensor:
    """(XᵀP − PᵀP) H⁻¹, [in_features, in_features]."""
    apart = statistics.values["cross_gram"] - statistics.gram
    return (apart @ gram.inverse_root.t()) @ gram.inverse_root


def adaptive(
    pattern: Pattern,
    count: Count,
    blocksize: int,
    scores: Callable[[Tensor, int], Tensor],
) -> tuple[Chooser, int]:
    """A chooser that decides inside the sweep, on weights that feel all pruning before them; and its width.

    Unstructured patterns compare all weights of ``blocksize`` columns, N:M those of each group of M.

    Args:
        scores: given the current columns [width, out_features] and the index of the first, what to rank them by.
    """
    if isinstance(pattern, NM):
        drop = pattern.m - pattern.n
        return (lambda columns, start: lowest(scores(columns, start), drop)), pattern.m
    rule = Comparison("layer", 1, count)

    def choose(columns: Tensor, start: int) -> Tensor:
        if count != "total":
            return select(scores(columns, start), pattern, rule)
        # The matrix's total is met exactly by giving each block what is due up to its end.
        rows = columns.shape[1]
        due = [int(pattern.sparsity * rows * upto) for upto in (start, start + len(columns))]
        return smallest(scores(columns, start).reshape(1, -1), due[1] - due[0]).view(columns.shape)

    return choose, blocksize
