"""Runs a weight pass over a program: which region runs when, what is measured where, and each site's turn.

The three schedules differ only in where regions are cut and whether a region runs again:

``layer``  a cut before every input group; a group is pruned as soon as its statistics are complete, and the one
           forward goes on with the pruned weights.
``block``  a cut before every block; its statistics come from the block still dense, then it runs again pruned: the
           procedure of the Wanda and SparseGPT papers (algorithms.md, section 1.2).
``dense``  cuts as in ``layer``, but the forward goes on with dense weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, fx

from sparsify.analysis.linear import InputGroup, LinearSite, group_by_input
from sparsify.analysis.region import Flow
from sparsify.calibration.interpreter import Interpreter, Watch
from sparsify.calibration.rows import RowReader
from sparsify.calibration.statistics import GroupRecorder, InputStatistics
from sparsify.calibration.store import ActivationStore
from sparsify.errors import CalibrationError, SparsifyError
from sparsify.program import Program
from sparsify.targets import Target
from sparsify.verify import verify_pruned
from sparsify.weight_pass import WeightPass

Schedule = Literal["layer", "block", "dense"]


@dataclass
class SiteResult:
    """What happened at one site.

    Attributes:
        kept: fraction of weights that are not zero. ``error``: ‖XWᵀ−XŴᵀ‖/‖XWᵀ‖ over the calibration tokens, None
            where nothing was measured. ``without_data``: experts that no token reached.
    """

    name: str
    kind: str
    parameter: str
    shape: tuple[int, ...]
    pattern: str
    kept: float
    error: float | None
    seconds: float
    tokens: int
    sources: list[str]
    without_data: list[int] = field(default_factory=list)


@dataclass
class Progress:
    """What an observer is told: after a batch of a region (``site`` None), and after each site is pruned.

    ``tokens`` are those of the batch that just left a region; every token leaves every region once.
    """

    regions_done: int
    regions: int
    label: str
    tokens: int
    site: SiteResult | None = None


Observer = Callable[[Progress], None]


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


def prune_without_data(
    program: Program, weight_pass: WeightPass, targets: Sequence[Target], observe: Observer
) -> list[SiteResult]:
    """Prune every target by its weights alone; nothing is run."""
    results = []
    for number, target in enumerate(targets):
        empty = InputStatistics({}, 0, 0)
        result, _ = _prune_target(program, weight_pass, target, [empty] * target.site.experts, None)
        results.append(result)
        observe(Progress(number + 1, len(targets), target.site.name, 0, result))
    return results


class Engine:
    """One calibrated run of a pass over a program.

    Args:
        batches: input name to tensor, all of the shapes that the program was captured with.
        memory: bytes of activations kept in memory; more are spilled to a file.
    """

    def __init__(
        self,
        program: Program,
        weight_pass: WeightPass,
        targets: Sequence[Target],
        batches: Sequence[dict[str, Tensor]],
        *,
        schedule: Schedule = "layer",
        memory: int = 8 << 30,
        device: torch.device | None = None,
        observe: Observer = lambda progress: None,
    ) -> None:
        self.program, self.weight_pass, self.schedule, self.observe = program, weight_pass, schedule, observe
        self.batches, self.memory, self.device = batches, memory, device or torch.device("cpu")
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
        merged = self._merged_statistics()
        steps = self._steps(self.groups)
        # ``block`` looks at the inputs of a block's first group after the cut before it, so they must live till then.
        end = steps[-1].measured + (self.schedule == "block")
        with ActivationStore(self.memory) as store, torch.no_grad():
            runner = Interpreter(self.program, self.flow, self.batches, store, self.device)
            done: set[str] = set()
            recorders = self._measure(runner, 0, steps[0].start, end, steps, 0)
            for number, step in enumerate(steps):
                if self.schedule == "block":
                    recorders |= self._measure(runner, step.start, step.measured, end, steps, number, again=True)
                for index, group in enumerate(step.groups):
                    recorder = recorders.pop((number, index))
                    for site in group.sites:
                        if site.parameter not in done:
                            self._prune_site(runner, site, merged.get(site.parameter, recorder), number, len(steps))
                            done.add(site.parameter)
                if number + 1 < len(steps):
                    recorders = self._measure(runner, step.start, steps[number + 1].start, end, steps, number + 1)
        return self.results

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
        runner: Interpreter,
        start: int,
        stop: int,
        end: int,
        steps: list[_Step],
        number: int,
        *,
        again: bool = False,
    ) -> dict[tuple[int, int], GroupRecorder]:
        """Run [start, stop) on all batches, recording the inputs of step ``number`` that it makes.

        In the ``block`` schedule the region between two blocks makes only live values: recording waits for the
        dense sweep of the block itself (``again``).
        """
        step = steps[number]
        recording = again or self.schedule != "block"
        recorders = {(number, i): self._recorder(group) for i, group in enumerate(step.groups) if recording}
        watch: dict[fx.Node, list[tuple[InputGroup, GroupRecorder]]] = {}
        for (_, i), recorder in recorders.items():
            anchor = self.rows.anchor(step.groups[i])
            watch.setdefault(anchor, []).append((step.groups[i], recorder))
        label = step.groups[0].block if self.schedule == "block" else None
        finished = iter(self.batch_tokens)

        runner.region(
            start,
            stop,
            end,
            watch=set(watch),
            on_value=self._recording(watch),
            again=again,
            wanted=set(watch) | self.rows.held if again else None,
            # A block's first sweep is half of its work: its tokens are counted when they leave it.
            after_batch=lambda: self.observe(
                Progress(number, len(steps), label or step.groups[0].name, 0 if again else next(finished))
            ),
        )
        return recorders

    def _recording(self, watch: Mapping[fx.Node, Sequence[tuple[InputGroup, GroupRecorder]]]) -> Watch:
        """What an interpreter calls at each watched node: its rows go to the recorders of the groups that read it."""

        def record(batch: int, node: fx.Node, values: dict[fx.Node, object]) -> None:
            for group, recorder in watch[node]:
                rows, ends = self.rows.read(group, self.batches[batch], values)
                if not recorder.update(rows, ends):
                    raise CalibrationError(
                        f"the input of {group.name}",
                        found=f"NaN or infinity in calibration batch {batch}",
                        do="Look for broken weights before this site, or run in float32",
                    )

        return record

    def _recorder(self, group: InputGroup) -> GroupRecorder:
        site = group.sites[0]
        return GroupRecorder(self.weight_pass.statistics, site.experts, site.shape[1], self.device, sketch=True)

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
        with ActivationStore(self.memory) as store, torch.no_grad():
            runner = Interpreter(self.program, self.flow, self.batches, store, self.device)
            for start, cut in zip(cuts, cuts[1:], strict=False):
                inside = {n for n in watch if start <= self.flow.position[n] < cut}
                runner.region(start, cut, stop, watch=inside, on_value=self._recording(watch))
        return merged

    def _prune_site(
        self, runner: Interpreter, site: LinearSite, recorder: GroupRecorder, number: int, steps: int
    ) -> None:
        target = self.targets[site.parameter]
        statistics = [recorder.statistics(e, self.sequences) for e in range(site.experts)]
        result, (before, after) = _prune_target(
            self.program, self.weight_pass, target, statistics, recorder, self.device
        )
        dense = self.schedule == "dense"
        runner.release(site.parameter, before if dense else after)
        if dense:
            # The store now holds the pruned weight; later readers must still find the dense one.
            runner.pinned |= {n for n in runner.resident if self.program.parameter(n) == site.parameter}
        self.results.append(result)
        self.observe(Progress(number, steps, site.name, 0, result))


def _prune_target(
    program: Program,
    weight_pass: WeightPass,
    target: Target,
    statistics: Sequence[InputStatistics],
    recorder: GroupRecorder | None,
    device: torch.device | None = None,
) -> tuple[SiteResult, tuple[Tensor, Tensor]]:
    """Prune one parameter, verify it, store it; returns the result and the weight before and after."""
    started = time.perf_counter()
    site, weights = target.site, program.weights
    stored = weights.read(target.parameter).to(device or "cpu")
    if not bool(torch.isfinite(stored).all()):
        raise CalibrationError(
            f"weight {target.parameter}",
            found="it holds NaN or infinity",
            do="Mend the checkpoint before pruning it",
        )
    before = site.matrices(stored)
    after = before.clone()
    unseen = [e for e, s in enumerate(statistics) if weight_pass.statistics and s.tokens == 0]
    if unseen and site.expert_axis is None:
        raise CalibrationError(
            f"the input of {site.name}",
            found="no calibration token reaches it",
            do="Use other calibration data",
        )
    for expert, statistic in enumerate(statistics):
        method = weight_pass.without_data() if expert in unseen else weight_pass
        try:
            pruned = method.prune(before[expert], statistic)
        except SparsifyError as error:
            raise type(error)(f"{error.asked} of {site.name}", found=error.found, do=error.do) from error
        verify_pruned(site.name, method, before[expert], pruned)
        after[expert] = pruned.weight.to(after.dtype)
    layout = site.layout(after, stored)
    weights.write(target.parameter, layout.cpu(), set(target.sources) if target.sources is not None else None)
    if target.sources is not None:
        # Only some checkpoint tensors of the stack were changed; what counts is what is there now.
        layout = weights.read(target.parameter).to(stored.device)
        after = site.matrices(layout)
    lost = total = 0.0
    if recorder is not None and recorder.sketch is not None:
        for expert in range(site.experts):
            one, other = recorder.sketch.error(expert, before[expert], after[expert])
            lost, total = lost + one, total + other
    measured = recorder is not None and recorder.sketch is not None and total > 0
    result = SiteResult(
        name=site.name,
        kind=site.kind,
        parameter=target.parameter,
        shape=tuple(stored.shape),
        pattern=str(weight_pass.pattern),
        kept=float((after != 0).sum()) / after.numel(),
        error=(lost / total) ** 0.5 if measured else None,
        seconds=time.perf_counter() - started,
        tokens=sum(s.tokens for s in statistics),
        sources=sorted(target.sources or weights.sources(target.parameter)),
        without_data=unseen,
    )
    return result, (stored, layout)
