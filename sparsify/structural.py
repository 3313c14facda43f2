"""What a structural pass is: mathematics from a group's weights and gradients to a score for each of its channels.

It knows no graph, no file and no model: which dimensions belong together, cutting them, and writing a smaller model are
:mod:`sparsify.restructure`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from sparsify.errors import SpecError
from sparsify.pattern import Pattern, Unstructured

Granularity = Literal["block", "channel"]


@dataclass(frozen=True)
class Part:
    """A parameter of a group, as a pass sees it.

    Attributes:
        weight: [positions, rest]: a row for each position of the dimension that shrinks, in float32.
        gradient: the same shape, the mean over calibration samples of the loss's gradient; None where it was not asked
            for.
        fisher: the mean of its square. channel: [positions], the channel of the group that each position belongs to.
    """

    weight: Tensor
    gradient: Tensor | None
    fisher: Tensor | None
    channel: Tensor


@dataclass(frozen=True)
class StructuralPass:
    """Base of all structural passes: a frozen dataclass whose fields are its options.

    Attributes:
        pattern: a share of channels to remove from each group.
        granularity: ``block``: heads, channels and experts' channels inside the repeated blocks; ``channel``: the
            residual width of the whole model.
        round: what is left of a group's channels is a multiple of this; heads stay whole and are not rounded.
    """

    pattern: Pattern
    granularity: Granularity = "block"
    round: int = 8

    name: ClassVar[str]
    summary: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, Unstructured):
            raise SpecError(
                f"{self.name}:{self.pattern}", found="a structural pass removes a share of channels",
                do=f"Write {self.name}:25%, say; for N:M zeros take wanda:{self.pattern} after it",
            )  # fmt: skip
        if self.round < 1:
            raise SpecError(f"{self.name}:round={self.round}", found="it must be at least 1", do="Choose 8, say")

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of the gradient statistics it needs; none means no data."""
        return ()

    @property
    def needs_data(self) -> bool:
        return bool(self.statistics)

    def scores(self, parts: Sequence[Part], channels: int, seed: int) -> Tensor:
        """How much each of ``channels`` matters: [channels], the least go first.

        Args:
            parts: the group's linear weights, in the order in which the graph reads them.
            seed: another one for every group.
        """
        raise NotImplementedError

    def left(self, free: int, kind: str) -> int:
        """How many of ``free`` channels stay.

        Raises:
            SpecError: none would.
        """
        assert isinstance(self.pattern, Unstructured)
        exact = free * (1 - self.pattern.sparsity)
        unit = 1 if kind in ("heads", "experts") or free % self.round else self.round
        kept = min(free, int(exact / unit + (1 if kind == "heads" else 0) / 2) * unit)
        if kept < 1:
            raise SpecError(
                f"{self.name}:{self.pattern}", found=f"of {free} {kind} in multiples of {unit} none would be left",
                do="Ask for less, or for a smaller round",
            )  # fmt: skip
        return kept
