"""What became of one pass."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from sparsify.analysis.dimensions.lanes import Lanes
from sparsify.context import ChannelResult, RegionResult, SiteResult
from sparsify.errors import Refused
from sparsify.method.base import Pass
from sparsify.method.pattern import Grid, Pattern
from sparsify.prune.targets import Target


@dataclass
class PassRun:
    """One pass that is not structural: what it was to prune and, once it ran, what happened.

    Attributes:
        applied: the pass. targets, skipped: of a pass over matrices, those that it is for and those that it leaves,
            each with the reason. sites: what happened, site by site. regions: of a pass that trains, what became of
            each block. lanes, channels: of a pass that reorders channels, the groups that it is for and what became of
            each; ``skipped`` are those that stay in their order then. written: the parameters that it changed.
        seconds: of the whole pass.
    """

    applied: Pass
    schedule: str
    targets: list[Target] = field(default_factory=list)
    skipped: list[Refused] = field(default_factory=list)
    sites: list[SiteResult] = field(default_factory=list)
    regions: list[RegionResult] = field(default_factory=list)
    lanes: list[Lanes] = field(default_factory=list)
    channels: list[ChannelResult] = field(default_factory=list)
    written: set[str] = field(default_factory=set)
    seconds: float = 0.0

    @property
    def pattern(self) -> Pattern | Grid | None:
        """What it prunes or rounds to; None for a pass that takes no pattern."""
        found: Pattern | Grid | None = getattr(self.applied, "pattern", None)
        return found

    @property
    def rounds(self) -> bool:
        """Whether it rounds weights and prunes none, though some may become zero."""
        return isinstance(self.pattern, Grid)

    @property
    def kept(self) -> float:
        """Fraction of the weights of the pruned sites that are not zero."""
        sizes = [math.prod(site.shape) for site in self.sites]
        return sum(s.kept * n for s, n in zip(self.sites, sizes, strict=True)) / max(1, sum(sizes))


def zeros_of(runs: Iterable[PassRun]) -> float:
    """How many zeros the sites of ``runs`` hold: of a weight that several pruned, as the last left it."""
    last = {site.parameter: site for run in runs for site in run.sites}
    return sum((1 - site.kept) * math.prod(site.shape) for site in last.values())
