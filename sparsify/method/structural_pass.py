"""What a structural pass is: mathematics from a group's weights and gradients to a score for each of its channels.

It knows no graph, no file and no model: which dimensions belong together, cutting them, and writing a smaller model are
:mod:`sparsify.structure.restructure`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import ClassVar, Literal

from torch import Tensor

from sparsify.errors import SpecError
from sparsify.method.base import Change, Kind, Pass
from sparsify.method.pattern import Pattern, Unstructured

Granularity = Literal["block", "channel", "expert", "layer"]
Scope = Literal["local", "global"]
WidthKind = Literal["uniform", "ragged"]

# Rounds that a pass may be cut into: each writes the model once.
MOST_STEPS = 1000
# What fits 2:4, 4:8 and the tiles of every kernel.
_ROUND = 8

# Which kinds of groups each granularity is for.
KINDS: dict[Granularity, frozenset[str]] = {
    "block": frozenset({"heads", "channels"}),
    "channel": frozenset({"width"}),
    "expert": frozenset({"experts"}),
    "layer": frozenset(),
}


@dataclass(frozen=True)
class Part:
    """A parameter of a group, as a pass sees it.

    Attributes:
        weight: [positions, rest]: a row for each position of the dimension that shrinks, in float32.
        gradient: the same shape, the mean over calibration samples of the loss's gradient; None where it was not asked
            for.
        fisher: the mean of its square. channel: [positions], the channel of the group that each position belongs to.
        place: [positions], where inside of its channel it stands: 0 … ``places`` − 1, the same for every parameter of
            the group (a column of a head; of several query heads on one key-value head, that column of each).
    """

    weight: Tensor
    gradient: Tensor | None
    fisher: Tensor | None
    channel: Tensor
    place: Tensor
    places: int


@dataclass(frozen=True)
class StructuralPass(Pass):
    """Base of all structural passes.

    Attributes:
        pattern: a share of channels to remove from each group.
        granularity: ``block``: heads, channels and experts' channels inside the repeated blocks; ``channel``: the
            residual width of the whole model; ``expert``: whole experts with their router's row; ``layer``: whole
            blocks.
        widths: ``uniform``: only what the model's config can say, so that transformers loads the result; ``ragged``:
            any width for any layer (implied by scope=global, keep_first and keep_last), for :func:`sparsify.load`.
        scope: ``local``: the same share of every group; ``global``: of all groups of a kind together (heads with heads,
            channels with channels), each group's scores divided by their mean, so that layers come to differ in width.
        keep_first: blocks at the beginning that stay whole (LLM-Pruner's own choice for a deep model is 4); layers
            differ in width then.
        keep_last: blocks at the end that stay whole (LLM-Pruner: 2); layers differ in width then.
        steps: cut in so many rounds, the share rising evenly, with gradients taken anew for each.
        round: what is left of a group's channels is a multiple of this, whatever there were, so that N:M patterns fit
            it; where it is not given, of 8, and experts are not rounded; heads stay whole and are never rounded.
    """

    pattern: Pattern
    granularity: Granularity = "block"
    round: int | None = None
    widths: WidthKind = "uniform"
    scope: Scope = "local"
    keep_first: int = 0
    keep_last: int = 0
    steps: int = 1

    kind: ClassVar[Kind] = "structure"
    follows: ClassVar[frozenset[Kind]] = frozenset({"structure"})
    misplaced: ClassVar[str] = "weights changed before the model gets smaller"
    changes: ClassVar[frozenset[Change]] = frozenset({"shapes"})

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, Unstructured):
            raise SpecError(
                f"{self.name}:{self.pattern}",
                found="a structural pass removes a share of channels",
                do=f"Write {self.name}:25%, say; for N:M zeros take wanda:{self.pattern} after it",
            )
        least = {"round": 1, "steps": 1, "keep_first": 0, "keep_last": 0}
        for option, low in least.items():
            given = getattr(self, option)
            if given is not None and given < low:
                raise SpecError(
                    f"{self.name}:{option}={given}",
                    found=f"it must be at least {low}",
                    do=f"Choose {max(low, 8 if option == 'round' else 1)}, say",
                )
        if self.steps > MOST_STEPS:
            raise SpecError(f"{self.name}:steps={self.steps}", found=f"more than {MOST_STEPS}", do="Choose 10, say")
        if self.granularity == "channel" and self.ragged:
            raise SpecError(
                f"{self.name}:granularity=channel",
                found="one width for all blocks",
                do="Leave widths, keep_first, keep_last and scope out",
            )
        if self.granularity == "layer" and (self.widths == "ragged" or self.scope == "global"):
            raise SpecError(f"{self.name}:granularity=layer", found="blocks go whole", do="Leave widths and scope out")

    @property
    def ragged(self) -> bool:
        """Whether layers may come to differ in width."""
        if self.granularity == "layer":
            return False
        return self.widths == "ragged" or self.scope == "global" or self.keep_first > 0 or self.keep_last > 0

    def scores(self, parts: Sequence[Part], channels: int, seed: int) -> Tensor:
        """How much each of ``channels`` matters: [channels], the least go first.

        Args:
            parts: the group's linear weights, in the order in which the graph reads them.
            seed: another one for every group.
        """
        raise NotImplementedError

    def rounds(self) -> list[StructuralPass]:
        """One pass for each step: after the i-th of N the share is i/N of the whole one."""
        if self.steps == 1:
            return [self]
        assert isinstance(self.pattern, Unstructured)
        kept = [1 - self.pattern.sparsity * i / self.steps for i in range(self.steps + 1)]
        return [replace(self, steps=1, pattern=Unstructured(1 - after / before)) for before, after in pairwise(kept)]

    def left(self, free: int, kind: str) -> int:
        """How many of ``free`` channels stay: the most in multiples of :meth:`unit` that are no more than asked for;
        where those are none, the nearest.

        Raises:
            SpecError: none would, or all.
        """
        assert isinstance(self.pattern, Unstructured)
        unit = self.unit(kind)
        units = free * (1 - self.pattern.sparsity) / unit
        nearest = int(units + Fraction(1, 2)) * unit
        kept = nearest if kind == "heads" else int(units) * unit
        if not kept and nearest < free:
            kept = nearest
        if not 0 < kept < free:
            raise SpecError(
                f"{self.name}:{self.pattern}",
                found=f"of {free} {kind} in multiples of {unit} {'all' if kept else 'none'} would be left",
                do=f"Ask for {'more' if kept else 'less'}, or for a smaller round",
            )
        return kept

    def unit(self, kind: str) -> int:
        """What the number of channels that stay is a multiple of."""
        if kind == "heads":
            return 1
        return self.round or (1 if kind == "experts" else _ROUND)
