"""What a compile gives back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from sparsify.analysis.dimensions.lanes import Lanes
from sparsify.analysis.linear import Opaque
from sparsify.context import ChannelResult, RegionResult, SiteResult
from sparsify.data.batches import Calibration
from sparsify.errors import Refused, SpecError, near
from sparsify.frontend.materialize import materialize
from sparsify.frontend.source import Source
from sparsify.ir.program import Program
from sparsify.ir.weights import Weights
from sparsify.method.base import Pass
from sparsify.method.pattern import Pattern
from sparsify.prune.targets import Target
from sparsify.structure.record import Restructured


@dataclass
class PassRun:
    """One pass that is not structural: what it was to prune and, once it ran, what happened.

    Attributes:
        applied: the pass. targets, skipped: of a weight pass, the weights that it is for and those that stay dense,
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
    def pattern(self) -> Pattern | None:
        """What it prunes to; None for a pass that takes no pattern."""
        found: Pattern | None = getattr(self.applied, "pattern", None)
        return found

    @property
    def kept(self) -> float:
        """Fraction of the weights of the pruned sites that are not zero."""
        sizes = [math.prod(site.shape) for site in self.sites]
        return sum(s.kept * n for s, n in zip(self.sites, sizes, strict=True)) / max(1, sum(sizes))


@dataclass
class Compiled:
    """The result of :func:`compile`.

    Attributes:
        runs: one per pass, in order. ``calibration``: None where no data was used. ``opaque``: contractions with
            a parameter that no pass can prune. ``output``: the folder that was written, or None; ``notes``: what the
            backend says of it. ``structure``: what structural passes took out, before ``runs``; ``source`` is the
            smaller model then. ``dense``: the weights before ``runs``, in the order that passes gave to channels.
            ``lowered``: the module that a lowering pass gave. ``manifest``: what ``sparsify.json``
            says of all this.
    """

    source: Source
    program: Program
    runs: list[PassRun]
    calibration: Calibration | None = None
    opaque: Sequence[Opaque] = ()
    structure: list[Restructured] = field(default_factory=list)
    dense: Weights | None = None
    output: Path | None = None
    notes: list[str] = field(default_factory=list)
    lowered: fx.GraphModule | None = None
    manifest: dict[str, Any] = field(default_factory=dict, repr=False)
    # Whoever owns the folder of a smaller model that was not written to an output.
    folder_owner: object = field(default=None, repr=False)

    def weight(self, name: str) -> Tensor:
        """A parameter as it is after the passes, by its name in the model or in the checkpoint."""
        weights = self.program.weights
        if name in weights:
            return weights.read(name)
        if name in set(weights.store.names()):
            return weights.store.read(name)
        raise SpecError(f"weight {name}", found="no such parameter", do=near(name, weights.parameters()))

    @property
    def model(self) -> nn.Module:
        """The pruned model: a copy of a module given in Python, sharing what was not pruned; else built anew.

        After a lowering pass it is the lowered graph, for inputs of the shapes that the model was traced with.
        """
        if self.lowered is not None:
            return self.lowered
        changed = {name for run in self.runs for name in run.written}
        return materialize(self.source, self.program.weights, changed)
