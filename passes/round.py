"""Round: the weights that are left take values of a grid of 8, 4 or 3 bits; what one loses, those right of it mend.

Source: Frantar et al., "GPTQ" (2210.17323), the sweep of optimal brain surgery with a rounding in the place of a prune;
refine.md, "Sparse and quantised": after an exact solve, a sweep over kept values is better than rounding to nearest,
and both are better than SparseGPT's joint sweep. How a value is made of its scale and its integer, and how both are
found again in a folder, is in :mod:`sparsify.method.grids`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sparsify.method.base import Kind
from sparsify.method.grids.finding import integers
from sparsify.method.grids.fitting import Fitted, Scale, fit, nearest, unfit_dtype
from sparsify.method.pattern import Grid
from sparsify.method.statistics import InputStatistics
from sparsify.method.weight_pass import MatrixPass, Pruned
from sparsify.passes.solvers.gram import DampedGram, damped_gram
from sparsify.passes.solvers.sweep import sweep
from sparsify.tensors import all_finite, zeroed

Group = Literal["32", "64", "128", "row"]


@dataclass(frozen=True)
class Round(MatrixPass):
    """Round the weights that are not zero to scale × integer (int8, int4 or int3); zeros stay zeros.

    Small weights may become zero too.

    Scales are numbers that float16 and the model's dtype both hold. A stored value is the dtype's nearest to scale ×
    integer, from which :func:`sparsify.method.grids.finding.integers` gives scales and integers back to the bit.

    Args:
        pattern: int8, int4 or int3.
        group: in_features that share a scale, or the whole ``row``; the last group of a row may be shorter.
        symmetric: integers from −2^(bits−1) to 2^(bits−1)−1 or, with a negative scale, the other way; false gives each
            group a zero point.
        scale: how a scale is found: ``mse`` by the least squared error, clipping included, each input weighted by its
            second moment where there is data; ``minmax`` from the largest weights, clipping none.
        compensation: ``sweep`` rounds from left to right, the weights to the right moving so that the outputs stay;
            ``none`` rounds each to its nearest and needs no data.
        percdamp: damping of the Gram matrix, as a share of the mean of its diagonal.

    >>> from sparsify.method.spec import parse_pass, spec_text
    >>> spec_text(parse_pass("round:int4,group=64,compensation=none"))
    'round:int4,group=64,compensation=none'
    """

    pattern: Grid
    group: Group = "row"
    symmetric: bool = True
    scale: Scale = "mse"
    compensation: Literal["sweep", "none"] = "sweep"
    percdamp: float = 0.01

    kind: ClassVar[Kind] = "rounding"
    # Whatever moved weights afterwards would take them off their grid.
    follows: ClassVar[frozenset[Kind]] = MatrixPass.follows | {"rounding"}
    misplaced: ClassVar[str] = "weights that are packed by then"
    name: ClassVar[str] = "round"
    summary: ClassVar[str] = "kept weights rounded to 8, 4 or 3 bits, the others compensating; after any other pass"
    when: ClassVar[str] = "after the last pass that prunes, for a model whose kept weights take few bits"
    example: ClassVar[str] = "round:int4,group=64"

    def __post_init__(self) -> None:
        if not 0 <= self.percdamp <= 100:
            raise self._refuse(f"percdamp={self.percdamp:g}", "damping is a share of the diagonal", "Choose 0.01, say")
        if self.compensation == "none":
            self._unused(("percdamp",), "it damps the sweep's Gram matrix, and compensation=none has no sweep")

    @property
    def statistics(self) -> tuple[str, ...]:
        return ("squared_norm", "gram") if self.compensation == "sweep" else ()

    @property
    def by_rows(self) -> bool:
        return True

    @property
    def keeps_weights(self) -> bool:
        return False

    @property
    def zero_points(self) -> int | None:
        return None if self.symmetric else self.pattern.bits

    def without_data(self) -> MatrixPass:
        return replace(self, compensation="none", percdamp=0.01)

    def width(self, in_features: int) -> int:
        """Columns of one group."""
        return in_features if self.group == "row" else min(int(self.group), in_features)

    def broken(self, weight: Tensor) -> str | None:
        found = integers(weight, self.pattern, self.width(weight.shape[1]), symmetric=self.symmetric)
        return f"values off a grid of {self.pattern}" if found is None else None

    def prune(self, weight: Tensor, statistics: InputStatistics) -> Pruned:
        self._check_dtype(weight.dtype)
        mask = weight == 0
        if self.compensation == "none":
            return self._finished(self.nearest(weight), weight, mask)
        gram = damped_gram(statistics, self.percdamp)
        return self._finished(self.swept(weight, mask, gram), weight, mask, gram)

    def nearest(self, weight: Tensor) -> Tensor:
        """Every weight at its nearest, by the scales of its group: float32."""
        width = self.width(weight.shape[1])
        return nearest(weight, self.pattern, width, symmetric=self.symmetric, scale=self.scale)

    def swept(self, weight: Tensor, mask: Tensor, gram: DampedGram) -> Tensor:
        """Column by column, float32: a group's scales are those of its weights as all before it left them."""
        # Inputs that calibration never saw count by their damping alone, without the one that stands for them in H.
        width, moments = self.width(weight.shape[1]), (gram.matrix.diagonal() - gram.dead.float()).clamp(min=0)
        gone = mask.t()
        fitted: list[Fitted] = []

        def enter(columns: Tensor, start: int) -> Tensor:
            own = gone[start : start + len(columns)]
            kept = zeroed(columns, own).t().contiguous()
            found = self._fit(kept, weight.dtype, moments[start : start + len(columns)])
            fitted[:] = [found.of_columns()]
            return own

        def settle(column: Tensor, _: int) -> None:
            column.copy_(fitted[0].rounded(column))

        return sweep(weight.float(), gram.root, enter, width, settle)[0]

    def _fit(self, values: Tensor, dtype: torch.dtype, weights: Tensor) -> Fitted:
        return fit(values, self.pattern, dtype, symmetric=self.symmetric, scale=self.scale, weights=weights)

    def _finished(self, result: Tensor, weight: Tensor, mask: Tensor, gram: DampedGram | None = None) -> Pruned:
        result = result.to(weight.dtype).contiguous()
        if not all_finite(result):
            raise self._refuse(
                f"group={self.group}",
                f"values past what {weight.dtype} holds",
                "Take a smaller group, or leave this weight out with --ignore",
            )
        notes = () if gram is None or gram.note is None else (gram.note,)
        return Pruned(result, mask, notes)

    def _check_dtype(self, dtype: torch.dtype) -> None:
        if (found := unfit_dtype(self.pattern, dtype, symmetric=self.symmetric)) is not None:
            raise self._refuse(
                "symmetric=false", found, "Leave symmetric out, or round a model that is stored in float16 or float32"
            )
