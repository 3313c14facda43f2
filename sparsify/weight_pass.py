"""What a weight pass is: mathematics from (weight, input statistics) to a pruned weight.

A pass is a frozen dataclass whose fields are its options. It knows no graph, no file and no device; order,
streaming, layouts, experts and progress are the engine's. See CONTRIBUTING.md for a worked example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, fx

from sparsify.calibration.statistics import InputStatistics
from sparsify.errors import SpecError
from sparsify.pattern import NM, Pattern
from sparsify.selection import Axis, Comparison, Count

if TYPE_CHECKING:
    from sparsify.fx import GraphPrune


@dataclass(frozen=True)
class Pruned:
    """The result of a pass on one matrix: ``weight`` and ``mask`` are [out_features, in_features].

    ``mask`` is True where a weight was pruned; there ``weight`` is zero.
    """

    weight: Tensor
    mask: Tensor


@dataclass(frozen=True)
class WeightPass:
    """Base of all weight passes.

    Class attributes:
        name: how the pass is called in a spec.
        statistics: names of the input statistics it needs (:mod:`sparsify.calibration.statistics`); none means
            that it needs no calibration data.
        keeps_weights: whether weights that are not pruned stay as they were, to the bit; verified after each site.
    """

    pattern: Pattern
    group: Axis | None = None
    blocksize: int = 1
    count: Count = "floor"

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    statistics: ClassVar[tuple[str, ...]] = ()
    keeps_weights: ClassVar[bool] = True
    default_group: ClassVar[Axis] = "output"

    def __post_init__(self) -> None:
        if self.blocksize < 1:
            raise self._refuse(f"blocksize={self.blocksize}", "it must be at least 1", "Choose a positive blocksize")
        if isinstance(self.pattern, NM):
            for option, value, default in (
                ("group", self.group, None),
                ("blocksize", self.blocksize, 1),
                ("count", self.count, "floor"),
            ):
                if value != default:
                    raise self._refuse(
                        f"{option}={value}",
                        f"{self.pattern} compares weights within its own groups of {self.pattern.m}",
                        f"Leave {option} out, or ask for a percentage",
                    )
        elif self.comparison.axis == "layer" and self.blocksize != 1:
            raise self._refuse(
                f"blocksize={self.blocksize}",
                "group=layer compares all weights of a layer",
                "Leave blocksize out",
            )

    @property
    def comparison(self) -> Comparison:
        """The group of weights that compete, with the default of the method."""
        return Comparison(self.group or self.default_group, self.blocksize, self.count)

    def prune(self, weight: Tensor, statistics: InputStatistics) -> Pruned:
        """Prune one matrix.

        Args:
            weight: [out_features, in_features], the dtype of the checkpoint.
            statistics: what was recorded about its input.
        """
        raise NotImplementedError

    def without_data(self) -> WeightPass:
        """The pass for an expert that no calibration token reached."""
        return self

    def __call__(self, graph_module: fx.GraphModule, calibration: Sequence[Any] = ()) -> Any:
        """Prune a bare GraphModule; returns ``torch.fx``'s PassResult. See :class:`sparsify.fx.GraphPrune`."""
        return self.bind(calibration)(graph_module)

    def bind(self, calibration: Sequence[Any] = (), **options: Any) -> GraphPrune:
        """This pass with its calibration inputs, as a ``torch.fx`` pass for any PassManager."""
        from sparsify.fx import GraphPrune

        return GraphPrune(self, calibration, **options)

    def _refuse(self, asked: str, found: str, do: str) -> SpecError:
        return SpecError(f"{self.name}:{self.pattern},{asked}", found=found, do=do)
