"""Measuring the inputs of sites: where regions are cut, what is recorded in each, and measurements of a whole model.

A cut is where the inputs of one group, or of all groups of a block, are complete. Who prunes between two cuts is
:mod:`sparsify.prune.engine`; without one, :func:`measure_inputs` and :func:`drift` look at a model as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sparsify.analysis.flow import Flow
from sparsify.analysis.linear import InputGroup, LinearSite, group_by_input
from sparsify.calibration.accumulators import OUTPUTS
from sparsify.calibration.interpreter import Region
from sparsify.calibration.recorder import GroupRecorder, OutputMoments
from sparsify.calibration.rows import RowReader
from sparsify.calibration.streams import Streams
from sparsify.context import Context, Progress, SiteResult
from sparsify.data.batches import count_sequences
from sparsify.host import within_memory
from sparsify.ir.program import Program
from sparsify.ir.weights import Weights
from sparsify.precision import exact_products


@dataclass(frozen=True)
class Step:
    """One cut: the groups whose statistics are complete when the nodes before ``measured`` have run."""

    number: int
    groups: tuple[InputGroup, ...]
    at: tuple[int, ...]
    label: str

    @property
    def start(self) -> int:
        return self.at[0]

    @property
    def measured(self) -> int:
        return self.at[-1]


class Measuring:
    """The groups of some sites, in the order in which their inputs are made, and what is recorded of them.

    Args:
        wanted: names of the statistics.
        by_block: one step for all groups of a block, not one for each. phase: what observers are told that this is.
    """

    def __init__(
        self,
        program: Program,
        sites: Sequence[LinearSite],
        batches: Sequence[Mapping[str, Tensor]],
        wanted: Sequence[str],
        context: Context,
        *,
        by_block: bool = False,
        phase: str = "measuring",
    ) -> None:
        flow = Flow.of(program)
        self.program, self.wanted, self.context = program, wanted, context
        # What this process runs of the batches that all are about.
        self.batches = context.world.share(batches, "calibration batches")
        self.first, _ = context.world.bounds(len(batches))
        self.groups = sorted(group_by_input(sites), key=lambda group: _position(flow, group))
        self.rows = RowReader(program, flow, self.groups)
        self.flow = flow.holding(self.rows.held)
        self.sequences = count_sequences(batches)
        self.tokens = sum(self.rows.tokens(batch) for batch in batches)
        self.phase = phase
        self.steps = self._steps(by_block)
        self._layers = _layers(self.steps)
        self._reached = 0, 0.0

    def streams(self, dense: Weights | None) -> Streams:
        return Streams(self.program, self.flow, self.rows, self.batches, self.context, dense, first=self.first)

    def recorder(self, group: InputGroup, twin: bool = False) -> GroupRecorder:
        """What records the input of ``group`` and, where a statistic asks for them, the outputs of its sites."""
        site, device, weights = group.sites[0], self.context.device, self.program.weights
        world = self.context.world
        recorder = GroupRecorder(self.wanted, site.experts, site.shape[1], device, twin=twin, world=world)
        if OUTPUTS.keys() & set(self.wanted):
            for own in group.sites:
                weight = own.matrices(weights.read(own.parameter).to(device))
                bias = None if own.bias is None else own.biases(weights.read(own.bias).to(device))
                recorder.outputs[own.parameter] = OutputMoments(self.wanted, weight, bias)
        return recorder

    def run(
        self, streams: Streams, step: Step, region: Region, *, twin: bool = False, until: float = 1.0
    ) -> list[GroupRecorder]:
        """Run ``region`` on all batches, recording the inputs of the groups of ``step`` that it makes.

        Args:
            until: how much of the step is done then.
        """
        recorders = [self.recorder(group, twin) for group in step.groups]
        self._run(streams, step, region, list(zip(step.groups, recorders, strict=True)), until)
        for recorder in recorders:
            recorder.join()
        return recorders

    def run_unrecorded(self, streams: Streams, step: Step, region: Region, *, until: float) -> None:
        """Run ``region`` on all batches for the live values that it makes."""
        self._run(streams, step, region, [], until)

    def once(self, dense: Weights | None = None) -> Iterator[tuple[InputGroup, GroupRecorder]]:
        """Every group with what one forward records of its input; the model stays as it is."""
        with self.streams(dense) as streams, torch.no_grad():
            start, end = 0, self.steps[-1].measured
            for step in self.steps:
                recorders = self.run(streams, step, Region(start, step.start, end), twin=dense is not None)
                start = step.start
                yield from zip(step.groups, recorders, strict=True)

    def merged(self) -> dict[str, GroupRecorder]:
        """Statistics of parameters that several groups read, over all of them, from a dense forward.

        Such a weight (a layer used repeatedly) must have one value everywhere, so its first use cannot wait for
        statistics of its last; the official code merges in the same way within a block.
        """
        readers: dict[str, list[InputGroup]] = {}
        for group in self.groups:
            for parameter in {site.parameter for site in group.sites}:
                readers.setdefault(parameter, []).append(group)
        repeated = {p: gs for p, gs in readers.items() if len(gs) > 1}
        if not repeated:
            return {}
        merged = {p: self.recorder(gs[0]) for p, gs in repeated.items()}
        pairs = [(group, merged[p]) for p, gs in repeated.items() for group in gs]
        watch = self._watch(pairs)
        stop = max(_position(self.flow, group) for group, _ in pairs)
        cuts = sorted({p for p in (_position(self.flow, g) for g in self.groups) if p < stop} | {0, stop})
        with self.streams(None) as streams, torch.no_grad():
            for start, cut in itertools.pairwise(cuts):
                inside = {n: found for n, found in watch.items() if start <= self.flow.position[n] < cut}
                streams.run_region(Region(start, cut, stop), inside)
        for recorder in merged.values():
            recorder.join()
        return merged

    def _run(
        self,
        streams: Streams,
        step: Step,
        region: Region,
        pairs: Sequence[tuple[InputGroup, GroupRecorder]],
        until: float,
    ) -> None:
        begin = self._reached[1] if self._reached[0] == step.number else 0.0
        finished = itertools.count(1)

        def tell() -> None:
            self.tell(step, begin + (until - begin) * next(finished) / len(self.batches))

        self.tell(step, begin)
        streams.run_region(region, self._watch(pairs), tell)

    def tell(self, step: Step, done: float, site: SiteResult | None = None) -> None:
        """Say how much of a step is done, and what became of a site of it."""
        self._reached = step.number, done
        layer, share = self._layers[step.number]
        what = step.label if site is None else site.name
        self.context.world.says(f"{self.phase} {what}")
        total = int(self._layers[-1][0]) + 1
        # Whoever is told of the last site of a layer is not yet in the next.
        at = layer + share * min(done, 0.999)
        self.context.observe(Progress(self.phase, at, total, what, "layer", self.tokens, site))

    def _watch(
        self, pairs: Sequence[tuple[InputGroup, GroupRecorder]]
    ) -> dict[fx.Node, list[tuple[InputGroup, GroupRecorder]]]:
        """Which groups are read at which node."""
        watch: dict[fx.Node, list[tuple[InputGroup, GroupRecorder]]] = {}
        for group, recorder in pairs:
            watch.setdefault(self.rows.anchor(group), []).append((group, recorder))
        return watch

    def _steps(self, by_block: bool) -> list[Step]:
        gathered: list[list[InputGroup]] = []
        for group in self.groups:
            if by_block and gathered and group.block is not None and gathered[-1][-1].block == group.block:
                gathered[-1].append(group)
            else:
                gathered.append([group])
        return [
            Step(
                number,
                tuple(groups),
                tuple(_position(self.flow, group) for group in groups),
                (groups[0].block if by_block else None) or groups[0].name,
            )
            for number, groups in enumerate(gathered)
        ]


def _layers(steps: Sequence[Step]) -> list[tuple[float, float]]:
    """Where each step begins, counted in layers, and what share of a layer it is: groups of a block are one layer."""
    found: list[tuple[float, float]] = []
    runs = itertools.groupby(steps, lambda step: step.groups[0].block or step.number)
    for layer, (_, run) in enumerate(runs):
        inside = list(run)
        found += [(layer + at / len(inside), 1 / len(inside)) for at in range(len(inside))]
    return found


def _position(flow: Flow, group: InputGroup) -> int:
    return min(flow.position[site.node] for site in group.sites)


def measure_inputs(
    program: Program,
    sites: Sequence[LinearSite],
    batches: Sequence[Mapping[str, Tensor]],
    wanted: Sequence[str],
    context: Context,
) -> dict[str, GroupRecorder]:
    """The statistics ``wanted`` of every site's input from one forward, nothing pruned; by parameter."""
    measuring = Measuring(program, sites, batches, wanted, context)
    found = {site.parameter: recorder for group, recorder in measuring.once() for site in group.sites}
    return found | measuring.merged()


@exact_products()
def drift(
    program: Program,
    sites: Sequence[LinearSite],
    batches: Sequence[Mapping[str, Tensor]],
    dense: Weights,
    context: Context,
) -> dict[str, float]:
    """‖X₀Wᵀ − XŴᵀ‖/‖X₀Wᵀ‖ of every site by its name: ``program`` as it is against itself with ``dense`` weights."""
    measuring = Measuring(program, sites, batches, (), context)
    found: dict[str, float] = {}
    for group, recorder in measuring.once(dense):
        for site in group.sites:
            with within_memory(f"the error of {site.name}", context.device):
                before, after = (
                    site.matrices(weights.read(site.parameter)).to(context.device)
                    for weights in (dense, program.weights)
                )
                found[site.name] = recorder.sketch.relative_error(before, after, site.name, context.world) or 0.0
    return found
