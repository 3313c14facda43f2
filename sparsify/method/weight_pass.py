"""What a weight pass is: mathematics from (weight, input statistics) to a pruned weight.

A pass is a frozen dataclass whose fields are its options. It knows no graph, no file and no device; order,
streaming, layouts, experts and progress are the engine's. See CONTRIBUTING.md for a worked example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal

from torch import Tensor

from sparsify.errors import SpecError
from sparsify.method.base import Change, Kind, Pass
from sparsify.method.pattern import NM, Grid, Pattern, Unstructured, parse_shares
from sparsify.method.selection import Axis, Comparison, Count, holds, select
from sparsify.method.statistics import InputStatistics
from sparsify.tensors import zeroed

Allocation = Literal["uniform", "owl", "error"]


@dataclass(frozen=True)
class Pruned:
    """The result of a pass on one matrix: ``weight`` and ``mask`` are [out_features, in_features].

    ``mask`` is True where a weight was pruned; there ``weight`` is zero. ``notes`` are what a user should know of
    this site; ``bias`` [out_features] replaces the site's where the pass changes that too.
    """

    weight: Tensor
    mask: Tensor
    notes: tuple[str, ...] = ()
    bias: Tensor | None = None


@dataclass(frozen=True)
class MatrixPass(Pass):
    """Base of all passes that take one matrix after the other: those that prune weights, and those that round them.

    Args:
        pattern: what a matrix is like afterwards.
    """

    pattern: Pattern | Grid

    kind: ClassVar[Kind] = "weights"
    follows: ClassVar[frozenset[Kind]] = frozenset({"structure", "graph", "channels", "weights", "regions"})
    misplaced: ClassVar[str] = "weights that are rounded or packed by then"
    changes: ClassVar[frozenset[Change]] = frozenset({"weights"})

    @property
    def keeps_weights(self) -> bool:
        """Whether weights that are not pruned stay as they were, to the bit; verified after each site."""
        return True

    @property
    def by_rows(self) -> bool:
        """Whether each output neuron is pruned as if it were alone: processes share such a matrix out by its rows.

        What is exact then, up to the rounding of products with fewer rows: ``prune(weight[rows])`` is
        ``prune(weight)[rows]``, of statistics of the weight those rows alone given.
        """
        return False

    def broken(self, weight: Tensor) -> str | None:
        """Where a result [out_features, in_features] is not as it should be, or None; verified after each site."""
        raise NotImplementedError

    def prune(self, weight: Tensor, statistics: InputStatistics) -> Pruned:
        """Prune (or round) one matrix.

        Args:
            weight: [out_features, in_features], the dtype of the checkpoint.
            statistics: what was recorded about its input.
        """
        raise NotImplementedError

    def without_data(self) -> MatrixPass:
        """The pass for an expert that no calibration token reached."""
        raise NotImplementedError

    def _given(self, option: str) -> bool:
        """Whether an option differs from its default."""
        return bool(getattr(self, option) != next(f.default for f in fields(self) if f.name == option))

    def _unused(self, options: Sequence[str], why: str) -> None:
        """Refuse options that would do nothing."""
        for option in options:
            if self._given(option):
                raise self._refuse(f"{option}={getattr(self, option)}", why, f"Leave {option} out")

    def _refuse(self, asked: str, found: str, do: str) -> SpecError:
        return SpecError(f"{self.name}:{self.pattern},{asked}", found=found, do=do)


@dataclass(frozen=True)
class WeightPass(MatrixPass):
    """Base of all passes that prune weights.

    Args:
        pattern: which weights go.
        group: which weights compete for a percentage: those of one ``output`` neuron, of one ``input``, or of the whole
            ``layer``; where it is not given, what the method's paper takes.
        blocksize: how many neighbouring output neurons (or inputs) compete together.
        count: how a share of n weights becomes a number: ``floor`` as the official code on floating point, ``exact``,
            ``threshold`` with one more and all ties, ``total`` to the weight over the whole matrix.
        allocation: how the zeros of a percentage are spread over layers: ``uniform``, ``owl`` by outliers, ``error`` by
            measured output error.
        spread: how far a layer's share may be from the one asked for, with an allocation; 0.08 for owl, 0.1 for error.
        outliers: for ``owl``: what lies above so many times the mean of its layer is an outlier.
        kinds: percentages of their own for kinds of layers, ``down_proj@45%/q_proj@60%``; the pattern is the others'.

    Class attributes:
        default_group: the comparison group where none is asked for.
    """

    pattern: Pattern
    group: Axis | None = None
    blocksize: int = 1
    count: Count = "floor"
    allocation: Allocation = "uniform"
    spread: float | None = None
    outliers: float = 5.0
    kinds: str = ""

    common_to: ClassVar[str] = "every pass that prunes weights"
    default_group: ClassVar[Axis] = "output"

    @property
    def needs_data(self) -> bool:
        """Whether it needs calibration: for statistics, or to spread its zeros over sites."""
        return bool(self.statistics) or self.allocation != "uniform"

    @property
    def exact_counts(self) -> bool:
        """Whether each comparison group loses what the pattern says; verified after each site."""
        return True

    def __post_init__(self) -> None:
        if self.blocksize < 1:
            raise self._refuse(f"blocksize={self.blocksize}", "it must be at least 1", "Choose a positive blocksize")
        if isinstance(self.pattern, NM):
            for option in ("group", "blocksize", "count"):
                if self._given(option):
                    raise self._refuse(
                        f"{option}={getattr(self, option)}",
                        f"{self.pattern} compares weights within its own groups of {self.pattern.m}",
                        f"Leave {option} out, or ask for a percentage",
                    )
        elif self.comparison.axis == "layer" and self._given("blocksize"):
            raise self._refuse(
                f"blocksize={self.blocksize}",
                "group=layer compares all weights of a layer",
                "Leave blocksize out",
            )
        self._check_allocation()
        self._check_kinds()

    def _check_kinds(self) -> None:
        if not self.kinds:
            return
        parse_shares(self.kinds)
        asked = f"kinds={self.kinds}"
        if isinstance(self.pattern, NM):
            raise self._refuse(asked, f"{self.pattern} fixes the zeros of every site", "Ask for a percentage")
        if self.allocation != "uniform":
            raise self._refuse(f"allocation={self.allocation},{asked}", "each shares the zeros out", "Give one of them")

    def _check_allocation(self) -> None:
        if self.allocation == "uniform":
            self._unused(("spread", "outliers"), "allocation=uniform gives every site the same sparsity")
            return
        asked = f"allocation={self.allocation}"
        if isinstance(self.pattern, NM):
            raise self._refuse(asked, f"{self.pattern} fixes the zeros of every site", "Ask for a percentage")
        if self._given("count"):
            raise self._refuse(f"{asked},count={self.count}", "an allocation fixes all counts", "Leave count out")
        if self.allocation == "error":
            self._unused(("outliers",), "it belongs to allocation=owl")
        if self.spread is not None and not 0 < self.spread < 1:
            raise self._refuse(f"spread={self.spread:g}", "it must lie between 0 and 1", "Choose 0.08, say")
        if self.outliers <= 1:
            raise self._refuse(f"outliers={self.outliers:g}", "an outlier exceeds the mean", "Choose 3 to 10")

    @property
    def comparison(self) -> Comparison:
        """The group of weights that compete, with the default of the method."""
        return Comparison(self.group or self.default_group, self.blocksize, self.count)

    @property
    def counted(self) -> Comparison:
        """The groups in which the result has the pattern's zeros: those of the comparison, unless a mask is chosen
        otherwise."""
        return self.comparison

    @property
    def compares_rows_alone(self) -> bool:
        """Whether only weights of one output neuron compete for being kept."""
        alone = self.comparison.axis == "output" and self.blocksize == 1 and self.count != "total"
        return alone or isinstance(self.pattern, NM)

    def broken(self, weight: Tensor) -> str | None:
        return holds(weight, self.pattern, self.counted) if self.exact_counts else None

    def without_data(self) -> WeightPass:
        """The pass for an expert that no calibration token reached: the smallest go, with this pass's pattern and
        comparison group, for that is all there is to go by."""
        if isinstance(self.pattern, NM):
            return Smallest(self.pattern)
        return Smallest(self.pattern, self.comparison.axis, self.blocksize, self.count)

    def allotted(self, pattern: Unstructured) -> WeightPass:
        """This pass for a site whose share of zeros an allocation has settled."""
        plain = WeightPass(pattern)
        return replace(
            self,
            pattern=pattern,
            count="total",
            allocation=plain.allocation,
            spread=plain.spread,
            outliers=plain.outliers,
        )


@dataclass(frozen=True)
class Smallest(WeightPass):
    """Plain magnitude: prune by |W|, no data and no update."""

    name: ClassVar[str] = "magnitude"

    def prune(self, weight: Tensor, statistics: InputStatistics) -> Pruned:
        mask = select(weight.abs(), self.pattern, self.comparison)
        return Pruned(zeroed(weight, mask), mask)
