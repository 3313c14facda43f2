"""Runs a weight pass over a program: which region runs when, what is measured where, and each site's turn.

The three schedules differ only in where regions are cut and whether a region runs again:

``layer``  a cut before every input group; a group is pruned as soon as its statistics are complete, and the one
           forward goes on with the pruned weights.
``block``  a cut before every block; its statistics come from the block still dense, then it runs again pruned: the
           procedure of the Wanda and SparseGPT papers (algorithms.md, section 1.2).
``dense``  cuts as in ``layer``, but the forward goes on with dense weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from sparsify.allocation import allocate
from sparsify.analysis.linear import InputGroup, LinearSite, group_by_input
from sparsify.analysis.region import Flow
from sparsify.calibration.gradients import Gradients, measure_gradients
from sparsify.calibration.recorder import GroupRecorder, OutputMoments
from sparsify.calibration.rows import RowReader
from sparsify.calibration.statistics import DENSE, GRADIENTS, OUTPUTS
from sparsify.calibration.streams import Streams
from sparsify.errors import SpecError
from sparsify.program import Program
from sparsify.pruning import Observer, Progress, SiteResult, prune_target, prune_without_data
from sparsify.targets import Target
from sparsify.weight_pass import WeightPass
from sparsify.weights import Weights

Schedule = Literal["layer", "block", "dense"]


@dataclass
class _Step:
    """One cut: the groups whose statistics are complete when the nodes before ``measured`` have run."""

    groups: list[InputGroup]
    at: list[int]

    @property
    def start(self) -> int:
        return self.at[0]

    @property
    def measured(self) -> int:
        return self.at[-1]


def prune(
    program: Program,
    weight_pass: WeightPass,
    targets: Sequence[Target],
    batches: Sequence[dict[str, Tensor]] | None,
    *,
    schedule: Schedule = "layer",
    dense: Weights | None = None,
    labels: Sequence[Tensor] | None = None,
    memory: int = 8 << 30,
    device: torch.device | None = None,
    observe: Observer = lambda progress: None,
) -> list[SiteResult]:
    """Run ``weight_pass`` over the targets of ``program``: gradients and the allocation first where it asks for them.

    Args:
        batches: input name to tensor, all of the shapes that the program was captured with; None for a pass that
            needs no data.
        dense: weights of the model as it was given, for passes fitted to its outputs.
        labels: per batch, what a loss compares the outputs with; None where the batch itself tells.
        memory: bytes of activations kept in memory; more are spilled to a file.

    Raises:
        SparsifyError: as :class:`Engine`.
    """
    if batches is None:
        return prune_without_data(program, weight_pass, targets, observe)
    place = device or torch.device("cpu")
    wanted = GRADIENTS & set(weight_pass.statistics)
    gradients = Gradients(memory // 4)
    with gradients:
        if wanted:
            measure_gradients(program, targets, batches, labels, wanted, gradients, memory, place, observe)
        passes = {target.parameter: weight_pass for target in targets}
        if weight_pass.allocation != "uniform":
            recorders = Engine(
                program, passes, targets, batches, schedule="dense", memory=memory, device=place, observe=observe
            ).measure(("squared_norm",))
            passes = allocate(
                program, weight_pass, targets, recorders, sum(len(next(iter(b.values()))) for b in batches), place
            )
        return Engine(
            program, passes, targets, batches, schedule=schedule, dense=dense, gradients=gradients, memory=memory,
            device=place, observe=observe,
        ).run()  # fmt: skip


class Engine:
    """One calibrated run of a pass over a program.

    Args:
        passes: for each target's parameter, the pass that prunes it; they differ in their patterns at most.
        others: see :func:`prune`.
    """

    def __init__(
        self,
        program: Program,
        passes: Mapping[str, WeightPass],
        targets: Sequence[Target],
        batches: Sequence[dict[str, Tensor]],
        *,
        schedule: Schedule = "layer",
        dense: Weights | None = None,
        gradients: Gradients | None = None,
        memory: int = 8 << 30,
        device: torch.device | None = None,
        observe: Observer = lambda progress: None,
    ) -> None:
        self.program, self.passes, self.schedule, self.observe = program, passes, schedule, observe
        self.batches, self.memory, self.device = batches, memory, device or torch.device("cpu")
        self.gradients = gradients
        self.wanted = next(iter(passes.values())).statistics
        self.dense = dense
        self.flow = Flow.of(program)
        self.targets = {target.parameter: target for target in targets}
        self.sites = [site for target in targets for site in target.sites]
        self.groups = sorted(group_by_input(self.sites), key=self._position)
        self.rows = RowReader(program, self.flow, self.groups)
        self.sequences = sum(len(next(iter(batch.values()))) for batch in batches)
        self.batch_tokens = [self.rows.tokens(batch) for batch in batches]
        self.results: list[SiteResult] = []

    def run(self) -> list[SiteResult]:
        """Prune every target and return what happened, in the order it happened.

        Raises:
            CalibrationError: a NaN or infinite activation (the site is named), or statistics that a pass cannot use.
            VerifyError: a pass broke its promise.
        """
        if DENSE & set(self.wanted) and (
            self.dense is None or ("cross_gram" in self.wanted and self.schedule == "dense")
        ):
            raise SpecError(
                f"fitting to the dense model in schedule {self.schedule}",
                found="one stream" if self.dense is not None else "no dense weights beside the pruned ones",
                do="Use --schedule layer",
            )
        merged = self._merged_statistics()
        steps = self._steps(self.groups)
        # ``block`` looks at the inputs of a block's first group after the cut before it, so they must live till then.
        end = steps[-1].measured + (self.schedule == "block")
        with self._streams(self.dense if "cross_gram" in self.wanted else None) as streams, torch.no_grad():
            done: set[str] = set()
            recorders = self._measure(streams, 0, steps[0].start, end, steps, 0)
            for number, step in enumerate(steps):
                if self.schedule == "block":
                    recorders |= self._measure(streams, step.start, step.measured, end, steps, number, again=True)
                for index, group in enumerate(step.groups):
                    recorder = recorders.pop((number, index))
                    for site in group.sites:
                        if site.parameter not in done:
                            self._prune_site(streams, site, merged.get(site.parameter, recorder), number, len(steps))
                            done.add(site.parameter)
                    del recorder
                if number + 1 < len(steps):
                    recorders = self._measure(streams, step.start, steps[number + 1].start, end, steps, number + 1)
        return self.results

    def measure(self, wanted: tuple[str, ...]) -> dict[str, GroupRecorder]:
        """The statistics of every target's input from one forward, nothing pruned; by parameter."""
        self.wanted = wanted
        found: dict[str, GroupRecorder] = {}
        for group, recorder in self._observed(None):
            found |= {site.parameter: recorder for site in group.sites}
        return found | self._merged_statistics()

    def drift(self) -> dict[str, float]:
        """‖X₀Wᵀ − XŴᵀ‖/‖X₀Wᵀ‖ of every site by its name: this model against ``dense``, nothing pruned."""
        if self.dense is None:
            raise SpecError("the error against the dense model", found="no dense weights", do="Give dense")
        self.wanted = ()
        found: dict[str, float] = {}
        for group, recorder in self._observed(self.dense):
            for site in group.sites:
                before, after = (
                    site.matrices(w.read(site.parameter)).to(self.device) for w in (self.dense, self.program.weights)
                )
                found[site.name] = recorder.sketch.relative_error(before, after) or 0.0
        return found

    def _observed(self, dense: Weights | None) -> Iterator[tuple[InputGroup, GroupRecorder]]:
        """Every group with what one forward records of its input."""
        steps = self._steps(self.groups)
        with self._streams(dense) as streams, torch.no_grad():
            start = 0
            for number, step in enumerate(steps):
                recorders = self._measure(
                    streams, start, step.start, steps[-1].measured, steps, number, dense is not None
                )
                start = step.start
                for (_, index), recorder in recorders.items():
                    yield step.groups[index], recorder

    def _streams(self, dense: Weights | None) -> Streams:
        return Streams(self.program, self.flow, self.rows, self.batches, self.memory, self.device, dense)

    def _position(self, group: InputGroup) -> int:
        return min(self.flow.position[site.node] for site in group.sites)

    def _steps(self, groups: list[InputGroup]) -> list[_Step]:
        steps: list[_Step] = []
        for group in groups:
            at = self._position(group)
            same_block = steps and group.block is not None and steps[-1].groups[-1].block == group.block
            if self.schedule == "block" and same_block:
                steps[-1].groups.append(group)
                steps[-1].at.append(at)
            else:
                steps.append(_Step([group], [at]))
        return steps

    def _measure(
        self,
        streams: Streams,
        start: int,
        stop: int,
        end: int,
        steps: list[_Step],
        number: int,
        twin: bool = False,
        *,
        again: bool = False,
    ) -> dict[tuple[int, int], GroupRecorder]:
        """Run [start, stop) on all batches, recording the inputs of step ``number`` that it makes.

        In the ``block`` schedule the region between two blocks makes only live values: recording waits for the
        dense sweep of the block itself (``again``).
        """
        step = steps[number]
        recording = again or self.schedule != "block"
        recorders = {(number, i): self._recorder(group, twin) for i, group in enumerate(step.groups) if recording}
        watch: dict[fx.Node, list[tuple[InputGroup, GroupRecorder]]] = {}
        for (_, i), recorder in recorders.items():
            anchor = self.rows.anchor(step.groups[i])
            watch.setdefault(anchor, []).append((step.groups[i], recorder))
        label = step.groups[0].block if self.schedule == "block" else None
        finished = iter(self.batch_tokens)

        streams.region(
            start,
            stop,
            end,
            watch,
            again=again,
            wanted=set(watch) | self.rows.held if again else None,
            # A block's first sweep is half of its work: its tokens are counted when they leave it.
            after_batch=lambda: self.observe(
                Progress(number, len(steps), label or step.groups[0].name, 0 if again else next(finished))
            ),
        )
        return recorders

    def _recorder(self, group: InputGroup, twin: bool = False) -> GroupRecorder:
        site = group.sites[0]
        recorder = GroupRecorder(self.wanted, site.experts, site.shape[1], self.device, twin=twin)
        if OUTPUTS.keys() & set(self.wanted):
            for own in group.sites:
                weights = self.program.weights
                weight = own.matrices(weights.read(own.parameter).to(self.device))
                bias = None if own.bias is None else weights.read(own.bias).to(self.device)
                recorder.outputs[own.parameter] = OutputMoments(self.wanted, weight, bias)
        return recorder

    def _merged_statistics(self) -> dict[str, GroupRecorder]:
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
        merged = {p: self._recorder(gs[0]) for p, gs in repeated.items()}
        watch: dict[fx.Node, list[tuple[InputGroup, GroupRecorder]]] = {}
        for parameter, readings in repeated.items():
            for group in readings:
                watch.setdefault(self.rows.anchor(group), []).append((group, merged[parameter]))
        stop = max(self._position(group) for gs in repeated.values() for group in gs)

        cuts = sorted({p for p in map(self._position, self.groups) if p < stop} | {0, stop})
        with self._streams(None) as streams, torch.no_grad():
            for start, cut in zip(cuts, cuts[1:], strict=False):
                streams.region(
                    start, cut, stop, {n: watch[n] for n in watch if start <= self.flow.position[n] < cut}
                )  # fmt: skip
        return merged

    def _prune_site(self, streams: Streams, site: LinearSite, recorder: GroupRecorder, number: int, steps: int) -> None:
        target = self.targets[site.parameter]
        own = self.gradients.read(site) if self.gradients is not None else {}
        if "dense_weight" in self.wanted and self.dense is not None:
            own["dense_weight"] = site.matrices(self.dense.read(site.parameter).to(self.device))
        result, (before, after) = prune_target(
            self.program, self.passes[site.parameter], target, recorder, self.sequences, own, self.device
        )
        runner, dense = streams.runner, self.schedule == "dense"
        runner.release(site.parameter, before if dense else after)
        if site.bias is not None and not dense:
            runner.release(site.bias)  # a pass may have changed it
        if dense:
            # The store now holds the pruned weight; later readers must still find the dense one.
            runner.pinned |= {n for n in runner.resident if self.program.parameter(n) == site.parameter}
        self.results.append(result)
        self.observe(Progress(number, steps, site.name, 0, result))
