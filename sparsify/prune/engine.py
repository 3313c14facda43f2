"""Runs a weight pass over a program: which region runs when, and each site's turn.

The three schedules differ only in where regions are cut and whether a region runs again:

``layer``  a cut before every input group; a group is pruned as soon as its statistics are complete, and the one
           forward goes on with the pruned weights.
``block``  a cut before every block; its statistics come from the block still dense, then it runs again pruned: the
           procedure of the Wanda and SparseGPT papers (algorithms.md, section 1.2).
``dense``  cuts as in ``layer``, but the forward goes on with dense weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sparsify.analysis.linear import LinearSite
from sparsify.analysis.tables import is_table
from sparsify.calibration.accumulators import DENSE, GRADIENTS
from sparsify.calibration.gradients import Samples, measure_gradients
from sparsify.calibration.interpreter import Region, alive, go_on
from sparsify.calibration.measuring import Measuring, Step, measure_inputs
from sparsify.calibration.recorder import GroupRecorder
from sparsify.calibration.streams import Streams
from sparsify.calibration.sums import Gradients
from sparsify.context import Context, SiteResult
from sparsify.data.batches import count_sequences
from sparsify.errors import SpecError
from sparsify.host import within_memory
from sparsify.ir.program import Program
from sparsify.ir.weights import Weights
from sparsify.journal.journal import NOT_KEPT, Kept
from sparsify.journal.reached import Reached
from sparsify.method.weight_pass import MatrixPass, WeightPass
from sparsify.precision import exact_products
from sparsify.prune.allocation import Measured, allocate
from sparsify.prune.shares import shared_out
from sparsify.prune.targets import Target
from sparsify.prune.turn import Turn, prune_without_data, taken
from sparsify.words import Schedule

# As progress counts it, so much of a step is done when its statistics are; the rest is pruning.
_MEASURED = 0.5


@exact_products()
def prune(
    program: Program,
    weight_pass: MatrixPass,
    targets: Sequence[Target],
    data: Samples | None,
    context: Context,
    *,
    schedule: Schedule = "layer",
    dense: Weights | None = None,
    kept: Kept = NOT_KEPT,
) -> list[SiteResult]:
    """Run ``weight_pass`` over the targets of ``program``: gradients and the allocation first where it asks for them.

    Args:
        data: batches of input name to tensor, all of the shapes that the program was captured with, and per batch what
            a loss compares the outputs with; None for a pass that needs no data.
        dense: weights of the model as it was given, for passes fitted to its outputs.
        kept: targets that a run before has finished, and where those of this one are kept. What it had to measure of
            the whole model is measured again, on the weights that this pass begins with.

    Raises:
        SparsifyError: as :class:`Engine`.
    """
    passes, tables = shared_out(weight_pass, targets), [target for target in targets if target.table]
    if tables:
        # First of all, so that whatever is measured afterwards is measured with them; of schedule ``dense`` last.
        others = [target for target in targets if not target.table]
        done = [] if schedule == "dense" else _prune_tables(program, passes, tables, context, kept)
        if others:
            done += prune(program, weight_pass, others, data, context, schedule=schedule, dense=dense, kept=kept)
        return done if schedule != "dense" else done + _prune_tables(program, passes, tables, context, kept)
    left = [target for target in targets if kept.find(target.parameter) is None]
    if data is None or not left:
        return prune_without_data(program, passes, targets, context, kept)
    wanted = GRADIENTS & set(weight_pass.statistics)
    with within_memory(f"pass {weight_pass.name}", context.device), Gradients(context.memory // 4) as gradients:
        if wanted:
            measure_gradients(program, [t.parameter for t in left], data, wanted, gradients, context)
        if isinstance(weight_pass, WeightPass) and weight_pass.allocation != "uniform":
            sites = [site for target in targets for site in target.sites]
            recorders = measure_inputs(program, sites, data.batches, ("squared_norm",), context)
            passes = allocate(
                weight_pass, targets, Measured(program, recorders, count_sequences(data.batches), context.device)
            )
        return Engine(program, passes, targets, data.batches, context, schedule, dense, gradients, kept).run()


def _prune_tables(
    program: Program, passes: Mapping[str, MatrixPass], tables: Sequence[Target], context: Context, kept: Kept
) -> list[SiteResult]:
    """Tables of embeddings without data: what their rows are multiplied with differs from row to row."""
    alone = {target.parameter: passes[target.parameter].without_data() for target in tables}
    done = prune_without_data(program, alone, tables, context, kept)
    told = "each value to its nearest, by no data: an embedding"
    return [
        replace(
            result, notes=[*result.notes, told + ("" if is_table(target.site) else ", and the head that shares it")]
        )
        for target, result in zip(tables, done, strict=True)
    ]


class Engine:
    """One calibrated run of a pass over a program.

    Args:
        passes: for each target's parameter, the pass that prunes it; they differ in their patterns at most.
        others: see :func:`prune`.
    """

    def __init__(
        self,
        program: Program,
        passes: Mapping[str, MatrixPass],
        targets: Sequence[Target],
        batches: Sequence[Mapping[str, Tensor]],
        context: Context,
        schedule: Schedule = "layer",
        dense: Weights | None = None,
        gradients: Gradients | None = None,
        kept: Kept = NOT_KEPT,
    ) -> None:
        self.program, self.passes, self.context, self.schedule = program, passes, context, schedule
        self.gradients, self.dense, self.kept = gradients, dense, kept
        self.wanted = next(iter(passes.values())).statistics
        self.targets = {target.parameter: target for target in targets}
        sites = [site for target in targets for site in target.sites]
        self.measuring = Measuring(
            program, sites, batches, self.wanted, context, by_block=schedule == "block", phase="pruning"
        )
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
        measuring, twice = self.measuring, self.schedule == "block"
        merged, done = measuring.merged(), set[str]()
        # What a run before has finished needs no statistics: its regions run for what comes after them alone.
        missing = {p for p in self.targets if self.kept.find(p) is None}
        # ``block`` looks at the inputs of a block's first group after the cut before it, so they must live till then.
        end = measuring.steps[-1].measured + twice
        with measuring.streams(self.dense if "cross_gram" in self.wanted else None) as streams, torch.no_grad():
            reached, blocks, start = Reached(self.kept, self.context.world), 0, 0
            first = self._go_on_from(reached, streams, missing)
            for step in measuring.steps:
                region = Region(start, step.start, end)
                if step.number < first:
                    # Its parts are read again; its region is not run.
                    streams.skip(region)
                left = {site.parameter for group in step.groups for site in group.sites} - done
                of = len(left)
                recorders: list[GroupRecorder | None] = [None] * len(step.groups)
                if (twice or not left & missing) and step.number >= first:
                    measuring.run_unrecorded(streams, step, region, until=_MEASURED / 2)
                if twice and left & missing:
                    recorders[:] = self._sweep_dense(streams, step, end)
                elif left & missing:
                    recorders[:] = measuring.run(streams, step, region, until=_MEASURED)
                # Popped, so that each is freed as soon as its sites have had their turn.
                for group in step.groups:
                    recorder = recorders.pop(0)
                    sites = {site.parameter: site for site in group.sites if site.parameter not in done}
                    done |= sites.keys()
                    # One process has one turn after the other; of several each begins with its part of all of them.
                    alone = [[site] for site in sites.values()]
                    for some in [list(sites.values())] if self.context.world.divided else alone:
                        turns = [self._turn(site, merged.get(site.parameter, recorder)) for site in some]
                        for site, turn, result in zip(some, turns, self._taken(turns), strict=True):
                            self._go_on(streams, site, turn)
                            self.results.append(result)
                            left.remove(site.parameter)
                            measuring.tell(step, 1 - (1 - _MEASURED) * len(left) / of, result)
                    del recorder
                start, blocks = step.start, blocks + self._ends_block(step)
                if self._ends_block(step) and step.number >= first and reached.due(blocks):
                    reached.keep(step.number + 1, alive(streams.runners))
        return self.results

    def _go_on_from(self, reached: Reached, streams: Streams, missing: Collection[str]) -> int:
        """The first step that is to be done, with what is alive before it in ``streams``.

        Raises:
            CheckpointError: what was kept of a run before is damaged.
        """
        found = reached.load()
        if found is None:
            return 0
        first, values = found
        before = [site for step in self.measuring.steps[:first] for group in step.groups for site in group.sites]
        if lost := next((site.parameter for site in before if site.parameter in missing), None):
            raise reached.damaged(f"it speaks of {lost}, which is not finished")
        go_on(streams.runners, values)
        return first

    def _ends_block(self, step: Step) -> bool:
        """Whether the next step is another block's."""
        after = self.measuring.steps[step.number + 1 : step.number + 2]
        return bool(after) and after[0].groups[0].block != step.groups[-1].block

    def _sweep_dense(self, streams: Streams, step: Step, end: int) -> list[GroupRecorder]:
        """The block of ``step`` while it is still dense, for its statistics; it will run again."""
        rows = self.measuring.rows
        wanted = {*rows.held, *(rows.anchor(group) for group in step.groups)}
        region = Region(step.start, step.measured, end, again=True, wanted=wanted)
        return self.measuring.run(streams, step, region, until=_MEASURED)

    def _turn(self, site: LinearSite, recorder: GroupRecorder | None) -> Turn:
        target, device = self.targets[site.parameter], self.context.device
        own = self.gradients.read(site, device) if self.gradients is not None else {}
        if "dense_weight" in self.wanted and self.dense is not None:
            own["dense_weight"] = site.matrices(self.dense.read(site.parameter).to(device))
        method, world, sequences = self.passes[site.parameter], self.context.world, self.measuring.sequences
        return Turn(self.program, method, target, device, recorder, sequences, own, world)

    def _taken(self, turns: Sequence[Turn]) -> Iterator[SiteResult]:
        results = taken(turns, self.kept)
        for turn in turns:
            with within_memory(f"pruning {turn.site.name}", self.context.device):
                yield next(results)

    def _go_on(self, streams: Streams, site: LinearSite, turn: Turn) -> None:
        """What runs from here on finds the weight as ``turn`` left it."""
        runner, dense = streams.runner, self.schedule == "dense"
        runner.release(site.parameter, turn.before if dense else turn.after)
        if site.bias is not None and not dense:
            runner.release(site.bias)  # a pass may have changed it
        if dense:
            # The store now holds the pruned weight; later readers must still find the dense one.
            runner.pinned |= {n for n in runner.resident if self.program.parameter(n) == site.parameter}
