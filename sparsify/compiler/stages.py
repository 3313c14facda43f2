"""The stages of a compile, one function each; :mod:`sparsify.compiler.pipeline` is their order."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from sparsify.analysis.graph_pass import GraphPass, LoweringPass
from sparsify.analysis.linear import find_sites
from sparsify.calibration.gradients import Samples
from sparsify.compiler.backend import Job
from sparsify.compiler.judging import Judge
from sparsify.compiler.keeping.dividing import told_of
from sparsify.compiler.keeping.job import apply_whole
from sparsify.compiler.manifest import make_manifest
from sparsify.compiler.request import Request, nothing_to_do
from sparsify.compiler.result import Compiled
from sparsify.compiler.runs import PassRun
from sparsify.compiler.seam import Seam
from sparsify.compiler.summary import as_dense
from sparsify.compiler.teacher import open_teacher
from sparsify.context import Context
from sparsify.data.batches import Calibration, example_batch, expected_batch, load_calibration
from sparsify.data.chat import Chat
from sparsify.data.inputs import check_length
from sparsify.data.pictures.image_text import names_image_text
from sparsify.errors import SpecError
from sparsify.files.ownership import Claim, Scratch
from sparsify.files.reading import kind_at
from sparsify.files.staging import check_output
from sparsify.frontend.capture import Batch, capture
from sparsify.frontend.source import Source, open_source, require_real
from sparsify.frontend.stores import find_folder
from sparsify.ir.graph import runnable
from sparsify.ir.program import Program
from sparsify.ir.store import MemoryStore, SpilledStore
from sparsify.journal.journal import Journal, Kept
from sparsify.journal.shared import shared
from sparsify.method.channel_pass import ChannelPass
from sparsify.method.pattern import NM
from sparsify.method.region_pass import RegionPass
from sparsify.method.weight_pass import MatrixPass
from sparsify.prune.engine import prune as prune_weights
from sparsify.prune.names import Named, Wanted
from sparsify.prune.targets import UNFIT, choose
from sparsify.refine.engine import fitting, lessons_of, refine
from sparsify.refine.regions import find_blocks
from sparsify.structure.orders import reordered
from sparsify.structure.plan import plan as plan_structure
from sparsify.structure.record import Restructured
from sparsify.structure.reorder import choose_lanes, reorder
from sparsify.structure.restructure import Captured
from sparsify.structure.rounds import check_source, in_a_folder, make_smaller


@dataclass
class Workplace:
    """A temporary folder, made when first asked for and gone with the compile, unless somebody keeps it; the place of
    the output, this job's until the backend takes it over; what is finished, activations ``every`` so many blocks."""

    stack: ExitStack
    output: Claim | None = None
    journal: Journal | None = None
    every: int = 0
    _folder: Scratch | None = None

    def begin(self, journal: Journal | None) -> None:
        """Keep what is finished in ``journal``."""
        self.journal = None if journal is None else self.stack.enter_context(journal)

    def kept(self, number: int) -> Kept:
        """What is kept of the pass of that number."""
        return Kept(number, self.journal, self.every)

    @property
    def path(self) -> Path:
        if self._folder is None:
            self._folder = Scratch("sparsify-smaller")
            self.stack.callback(self._clean)
        return Path(self._folder.name)

    def keep(self) -> object:
        """The folder's owner: whoever holds it keeps the folder."""
        folder, self._folder = self._folder, None
        return folder

    def _clean(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()


@dataclass(frozen=True)
class Planned:
    """What is going to be done: the model with one trace of it, and every pass with what it is for.

    Attributes:
        structure: what structural passes would take out. runs: the other passes; of weight passes those of the model
            as it is, which is why there are none yet where the model gets smaller first. dense: the model that passes
            fit to, where it is another one than ``model`` was.
    """

    model: Captured
    structure: list[Restructured]
    runs: list[PassRun]
    dense: Program | None = None

    @property
    def compiled(self) -> Compiled:
        """The plan as a result: nothing has run."""
        opaque = () if self.structure else find_sites(self.model.program)[1]
        return Compiled(self.model.source, self.model.program, self.runs, opaque=opaque, structure=self.structure)


def open_model(
    model: str | Path | nn.Module,
    request: Request,
    place: Workplace,
    *,
    tell: Callable[[str], None],
    **opening: Any,
) -> Source:
    """The model that a user names, and a look at where its output will lie.

    Args:
        tell: told what a quantized model grows to, before anything is done. opening: as for
            :func:`sparsify.frontend.source.open_source`.

    Raises:
        CheckpointError: no such model, or a broken one. BackendError: no place for the output.
        SpecError: no such dtype to compute in.
    """
    if request.out is not None and not request.dry_run:
        local = Path(model) if not isinstance(model, nn.Module) and kind_at(model) else None
        place.output = check_output(request.out, overwrite=request.overwrite, source=local)
        if place.output is not None:
            place.stack.enter_context(place.output)
    source = open_source(model, **opening)
    if isinstance(model, nn.Module):
        require_real(model)
    if not request.passes and request.backend.needs_pass and source.quantization is None:
        raise nothing_to_do()
    if isinstance(request.teacher, (str, Path)):
        find_folder(request.teacher)  # refuses what is not there, now
    if (found := source.quantization) is not None:
        tell(as_dense(source.name, found))
    if request.structural:
        check_source(source)
        if not request.dry_run:
            source = in_a_folder(source, place.path)
    return source


def plan(source: Source, request: Request, context: Context) -> tuple[Planned, Calibration | None]:
    """Trace the model once and decide what each pass does; nothing has run yet. Data that were given in Python come
    along, and text with images, for they alone tell the inputs.

    Raises:
        TraceError: no graph. SpecError: names that match nothing, or a pass for which there is nothing to do.
        CalibrationError: data that cannot be used.
    """
    given = None
    check_length(request.length, source)
    if request.needs_data and (not request.is_named or names_image_text(request.data, source)):
        given = _load(source, request, context)
    wanted = Wanted.of_each(source.weights, Named(request.only, request.ignore), request.named_by_passes)
    program = capture(source, _first_batch(source, request, given))
    model = Captured(source, program, wanted)
    structure = [
        plan_structure(source, program, own, wanted.of_pass(place)) for place, own in enumerate(request.structural)
    ]
    if request.fitted:
        find_blocks(program)  # refuses a model that has none
    # What other passes are for is known once the model is smaller.
    later = [PassRun(own, "later") for own in request.others]
    return Planned(model, structure, later if structure else _runs(model, request)), given


def as_plan(planned: Planned, judge: Judge | None) -> Compiled:
    """What a dry run gives back."""
    compiled = planned.compiled
    if judge is not None:
        compiled.notes.append(f"perplexity would be measured before and after, on {judge.size}")
    return compiled


def draw(
    planned: Planned, given: Calibration | None, request: Request, context: Context, judge: Judge | None
) -> tuple[Planned, Calibration | None]:
    """The calibration batches: only now, when all that can be refused has been, for drawing them may take minutes.

    The plan is the same, unless their shapes turned out otherwise than expected.
    """
    if given is not None or not request.needs_data:
        return planned, given
    model, structure = planned.model, planned.structure
    data = _load(model.source, request, context, templated=judge is not None and judge.used)
    if _same_shapes(model.program, data.batches[0]):
        return planned, data
    source, wanted = model.source, model.wanted
    # The graph of the plan goes before that of the real shapes comes.
    del planned, model
    again = Captured(source, capture(source, data.batches[0]), wanted)
    return Planned(again, structure, [] if structure else _runs(again, request)), data


def teach(planned: Planned, data: Calibration | None, request: Request, context: Context, **opening: Any) -> Planned:
    """The dense model that a user names for passes that fit to one, traced on the same data, before anything has run.

    Raises:
        CheckpointError, TraceError, SpecError: as :func:`sparsify.compiler.teacher.open_teacher` and
            :func:`sparsify.refine.engine.fitting`. CalibrationError: too few sequences to hold some back.
    """
    if request.teacher is not None:
        source = planned.model.source
        batch = _first_batch(source, request, data)
        planned = replace(planned, dense=open_teacher(request.teacher, source, batch, context, **opening))
    for own in request.fitted:
        lessons_of(own, () if data is None else data.batches, request.lesson)
        if not request.structural:
            fitting(planned.model.program, own, planned.dense or planned.model.program)
    return planned


def restructure(planned: Planned, data: Calibration | None, request: Request, seam: Seam, place: Workplace) -> Planned:
    """The model made smaller by every structural pass, and the other passes planned for it.

    Raises:
        SpecError, BackendError: as :func:`sparsify.structure.restructure.restructure`.
        SpecError, TraceError: as :func:`sparsify.refine.engine.fitting`, where a pass fits it to another model.
    """
    if not request.structural:
        return planned
    dense, model, done = planned.model.program, planned.model, list[Restructured]()
    samples = None if data is None else Samples(data.batches, data.labels)
    for number, own in enumerate(request.structural):
        with seam.running(own, model.program) as ran:
            model, records = make_smaller(model, own, samples, place.path, seam.context, number, place.kept(number))
            ran.program = model.program
        done += records
    for region_pass in request.fitted:
        fitting(model.program, region_pass, planned.dense or dense)
    return Planned(model, done, _runs(model, request), (planned.dense or dense) if request.fitted else None)


def open_output(planned: Planned, request: Request, place: Workplace, *, leads: bool = True) -> Job | None:
    """The output, under construction from here on: passes write to it. None where the result stays in memory."""
    source, program, store = planned.model.source, planned.model.program, planned.model.source.weights.store
    if request.out is None:
        # What is not the user's result is there for what this process has yet to read: on the disk, if it is large.
        program.weights = source.weights.on(MemoryStore(store) if leads else SpilledStore(store, place.path))
        return None
    if place.output is not None:
        place.output.release()
    job = request.backend.open(source, request.out, overwrite=request.overwrite, program=program)
    place.stack.enter_context(job)
    program.weights = job.weights
    return job


def prune(planned: Planned, data: Calibration | None, request: Request, seam: Seam, place: Workplace) -> Compiled:
    """Run every pass that is not structural, in the order given, on the weights of the output under construction.

    Raises:
        SparsifyError: what a pass refuses, or a promise that it broke.
    """
    compiled, program = planned.compiled, planned.model.program
    compiled.calibration, compiled.opaque = data, find_sites(program)[1]
    samples = None if data is None else Samples(data.batches, data.labels)
    compiled.dense = planned.model.source.weights
    for number, run in enumerate(planned.runs, len(request.structural)):
        own, kept = run.applied, shared(place.kept(number), seam.context.world)
        with seam.running(own, program) as ran:
            if isinstance(own, ChannelPass):
                assert data is not None
                run.channels, left, orders = reorder(program, own, run.lanes, data.batches, seam.context, kept)
                run.skipped += left
                compiled.dense = reordered(compiled.dense, orders)
            elif isinstance(own, MatrixPass):
                run.sites = prune_weights(
                    program,
                    own,
                    run.targets,
                    samples,
                    seam.context,
                    schedule=request.schedule,
                    dense=compiled.dense,
                    kept=kept,
                )
            elif isinstance(own, RegionPass):
                assert data is not None
                run.regions = refine(
                    program,
                    own,
                    data.batches,
                    seam.context,
                    # The dense model is of its own, or this graph with the weights that it began with.
                    planned.dense or replace(program, weights=planned.model.source.weights),
                    every=planned.dense is not None,
                    left=frozenset(planned.model.wanted.of_pass(number).ignored),
                    done=kept,
                    lesson=request.lesson,
                )
            elif isinstance(own, GraphPass):
                apply_whole(own, program, None if data is None else data.batches, seam.context, kept)
            elif isinstance(own, LoweringPass):
                compiled.lowered = own.lower(runnable(program, seam.context.device))
        run.seconds, run.written = ran.seconds, ran.written
    return compiled


def finish(
    compiled: Compiled, job: Job | None, request: Request, opened: Source, place: Workplace, context: Context
) -> Compiled:
    """The output in its place, with its manifest; or the result in memory; ``opened`` is the model before any pass."""
    compiled.manifest = make_manifest(compiled, request, context.seed, opened)
    compiled.source_card = opened.ledger.manifest.get("card")
    if compiled.evaluation is not None:
        compiled.manifest["evaluation"] = compiled.evaluation.as_dict()
    compiled.manifest |= told_of(context.world, compiled.runs, timed=not request.resume)
    if job is None:
        compiled.folder_owner = place.keep()
        return compiled
    # The folder has its final name only now; weights are read from there from here on.
    compiled.output, compiled.program.weights = job.finish(compiled.program, compiled.manifest)
    compiled.notes = job.notes()
    if place.journal is not None:
        place.journal.forget()
    return compiled


def _load(source: Source, request: Request, context: Context, *, templated: bool = False) -> Calibration:
    """Args:
    templated: a chat template that was given has served already.
    """
    chat = Chat(source, request.template)
    data = load_calibration(
        request.data,
        source,
        samples=request.samples,
        sequence_length=request.length,
        seed=context.seed,
        rows=request.most_rows,
        chat=chat,
        both=request.shares_data,
    )
    # Batches given in Python need none; the text that judges may, and has been asked.
    if request.is_named and not templated:
        chat.check_used(f"'{request.data}'" if request.data is not None else data.label)
    return data


def _first_batch(source: Source, request: Request, given: Calibration | None) -> Batch:
    """What the model is traced by: the data that were given, or the shape of what will be drawn."""
    if given is not None:
        return given.batches[0]
    if request.dry_run or not request.needs_data:
        return example_batch(source)
    return expected_batch(
        request.named,
        source,
        samples=request.samples,
        sequence_length=request.length,
        most=request.most_rows,
    )


def _runs(model: Captured, request: Request) -> list[PassRun]:
    """Every pass that is not structural, with the weights that it is for."""
    schedule = request.schedule if request.needs_data else "none"
    runs = []
    for place, own in enumerate(request.others, len(request.structural)):
        wanted = model.wanted.of_pass(place)
        if not isinstance(own, (ChannelPass, MatrixPass, RegionPass, GraphPass, LoweringPass)):
            raise SpecError(
                f"pass {own.name}",
                found=f"a pass of kind '{own.kind}' that nothing here runs",
                do="Derive it from WeightPass, RegionPass, ChannelPass, StructuralPass, GraphPass or LoweringPass",
            )
        run = PassRun(own, schedule)
        if isinstance(own, ChannelPass):
            run.lanes, run.skipped = choose_lanes(model.program, own, wanted)
        if isinstance(own, MatrixPass):
            run.targets, run.skipped = choose(model.program, own.pattern, wanted)
            if isinstance(own.pattern, NM) and any(hasattr(smaller, "round") for smaller in request.structural):
                m = own.pattern.m
                hint = f"; channels (not heads) fit it with round={m} of the pass that makes it smaller"
                run.skipped = [replace(s, reason=s.reason + hint) if s.code == UNFIT else s for s in run.skipped]
        runs.append(run)
    return runs


def _same_shapes(program: Program, batch: Batch) -> bool:
    traced = {n.meta["input"]: (tuple(n.meta["val"].shape), n.meta["val"].dtype) for n in program.inputs}
    given = {name: (tuple(value.shape), value.dtype) for name, value in batch.items() if name not in program.literals}
    return traced == given and program.unlike(batch) is None
