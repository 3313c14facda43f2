"""Run a structural pass: score the groups of a model, cut them, and write the smaller model as a Hugging Face folder.

The folder is an ordinary one: config.json says the new widths, and the model that transformers builds from it is
compared with the cut graph before anything is believed.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sparsify.analysis.dimensions.walk import Ids
from sparsify.calibration.gradients import Samples, measure_gradients
from sparsify.calibration.sums import Gradients
from sparsify.context import Context, Progress
from sparsify.errors import BackendError, CheckpointError, TraceError
from sparsify.files.ledger import Ledger
from sparsify.files.manifest import MANIFEST, read_manifest, write_json
from sparsify.files.modes import carry_modes
from sparsify.frontend.capture import capture
from sparsify.frontend.source import Source, open_source
from sparsify.ir.difference import difference
from sparsify.ir.program import Program
from sparsify.ir.weights import Weights
from sparsify.method.structural_pass import StructuralPass
from sparsify.prune.names import Wanted
from sparsify.prune.targets import choose
from sparsify.structure import layers
from sparsify.structure.config import together
from sparsify.structure.folder import renamed_experts, write_files, write_tensors
from sparsify.structure.plan import Choice, Choices, choose_groups, count_parameters, parameters_of, share_out
from sparsify.structure.record import Cut, Restructured
from sparsify.structure.score import Scores
from sparsify.structure.shrink import CutStore, kept_positions, shrink
from sparsify.tensors import same_bits


@dataclass(frozen=True)
class Captured:
    """A model at hand: opened, captured, and which of its tensors may be pruned."""

    source: Source
    program: Program
    wanted: Wanted


def restructure(
    model: Captured, structural_pass: StructuralPass, data: Samples | None, into: Path, context: Context, place: int = 0
) -> tuple[Captured, Restructured]:
    """Write the smaller model of ``model`` into the folder ``into``: the model that it holds, and what was done.

    Args:
        data: one calibration sample a batch, for a pass that needs gradients. place: of the pass among all.
        context: several processes share the gradients; each writes a folder of its own, of the same model.

    Raises:
        SpecError: a ratio that leaves nothing, names that match nothing, or groups that all are pinned.
        BackendError: widths that the model's config cannot say, or a smaller model that computes something else.
    """
    program, wanted = model.program, model.wanted.of_pass(place)
    if structural_pass.granularity == "layer":
        targets, _ = choose(program, structural_pass.pattern, wanted)
        parameters = [target.parameter for target in targets]
        choices = None
    else:
        choices = choose_groups(model.source, program, structural_pass, wanted)
        parameters = parameters_of(program, choices.chosen)
    with Gradients(context.memory // 4) as gradients:
        if structural_pass.statistics:
            assert data is not None, "a pass that needs data was given some"
            measure_gradients(program, parameters, data, structural_pass.statistics, gradients, context)
        samples = 1 if data is None else len(data.batches)
        context.observe(Progress("scoring", what=f"{len(parameters)} weights"))
        scores = Scores(program, structural_pass, gradients, samples, context.seed)
        context.world.says("making the model smaller")
        if choices is None:
            return _without_layers(model, structural_pass, parameters, scores, into, context)
        return _without_channels(model, structural_pass, choices, scores, into, context)


def _without_channels(
    model: Captured, structural_pass: StructuralPass, choices: Choices, scores: Scores, into: Path, context: Context
) -> tuple[Captured, Restructured]:
    source, program, dimensions = model.source, model.program, choices.dimensions
    chosen = choices.chosen
    each = [scores.of_channels(c)[torch.from_numpy(c.group.free)].double() for c in chosen]
    # From here on there are whole numbers alone: all processes cut alike, whatever their machines.
    each = [context.world.given(own, 0) for own in each]
    if structural_pass.scope == "global":
        chosen, each = share_out(structural_pass, chosen, each)
    remove = {c.number: _least(c, s) for c, s in zip(chosen, each, strict=True)}
    small = shrink(program, dimensions, remove)
    kept = kept_positions(dimensions, remove)
    config = together(c.fields for c in chosen)
    cut = Weights(CutStore(program.weights, kept), {n: n for n in program.weights.parameters()})
    write_files(source, cut, program.weights, config, into)
    cuts = [_cut(c, remove[c.number], kept) for c in chosen]
    counts = count_parameters(source), _count_left(source, kept)
    done = Restructured(structural_pass, cuts, choices.skipped, config, counts)
    note(source, done, into)
    smaller, captured = _compared(into, source, small, context)
    wanted = model.wanted.renamed(renamed_experts(program.weights, kept))
    return Captured(replace(smaller, name=source.name, checked=source.checked), captured, wanted), done


def _without_layers(
    model: Captured,
    structural_pass: StructuralPass,
    parameters: list[str],
    scores: Scores,
    into: Path,
    context: Context,
) -> tuple[Captured, Restructured]:
    """Blocks by the importance of all of their named weights together."""
    source, program = model.source, model.program
    stack = layers.stack_of(program)
    parts: list[list[str]] = [[] for _ in range(stack.count)]
    for parameter in parameters:
        if (number := stack.number(parameter)) is not None:
            parts[number].append(parameter)
    worth = context.world.told([scores.of_all(names, i) for i, names in enumerate(parts)])[0]
    gone = layers.least_important(stack, structural_pass, worth)
    config = layers.config_without(source, stack, gone)
    write_tensors(source, lambda: layers.stored_without(program.weights, stack, gone), config, into)
    smaller = open_smaller(into, source)
    cut = Cut("layers", stack.container, stack.count, stack.count - len(gone), tuple(gone), ())
    counts = count_parameters(source), count_parameters(smaller)
    done = Restructured(structural_pass, [cut], [], config, counts)
    note(source, done, into)
    smaller = replace(
        smaller, name=source.name, checked=source.checked, ledger=Ledger(into, "none", read_manifest(into))
    )
    captured = capture(smaller, program.zero_batch() | program.literals)
    names: dict[str, str | None] = dict.fromkeys(program.weights.store.names())
    wanted = model.wanted.renamed(names | layers.tensors_kept(program.weights, stack, gone))
    return Captured(smaller, captured, wanted), done


def _count_left(source: Source, kept: Mapping[str, Mapping[int, Ids]]) -> int:
    """How many numbers the parameters have without what goes, those that the trace does not reach among them."""
    count = 0
    for name, parameter in source.module.named_parameters():
        axes = kept.get(source.weights.canonical(name), {})
        count += math.prod(len(axes[axis]) if axis in axes else n for axis, n in enumerate(parameter.shape))
    return count


def _least(choice: Choice, scores: Tensor) -> list[int]:
    """The free channels that go: those of the lowest score."""
    order = scores.argsort(stable=True).numpy()[: len(scores) - choice.left]
    return sorted(choice.group.free[order].tolist())


def _cut(choice: Choice, removed: list[int], kept: Mapping[str, Mapping[int, Ids]]) -> Cut:
    members = tuple(
        (m.parameter, m.axis, tuple(kept[m.parameter][m.axis].tolist()))
        for m in choice.group.members
        if m.axis in kept.get(m.parameter, {})
    )
    return Cut(choice.kind, choice.name, len(choice.group.free), choice.left, tuple(removed), members)


def note(source: Source, done: Restructured, into: Path) -> None:
    """Until the output has a manifest of its own this is what says what was taken out. The folder, which is what the
    output is made of, is for those to read who may read the source.
    """
    before = source.ledger.manifest.get("structure", [])
    write_json(into / MANIFEST, {"structure": [*before, done.as_dict()]})
    carry_modes(source.folder, into, stat.S_IMODE(into.stat().st_mode))


def open_smaller(folder: Path, source: Source) -> Source:
    """The model that ``folder`` holds, opened as ``source`` was, from which its tensors were read and looked at."""
    made = open_source(
        folder,
        trust_remote_code=source.trust_remote_code,
        check=False,
        allow_nan=True,
        tokenizer=source.given_tokenizer,
    )
    return replace(
        made,
        name=source.name,
        allow_nan=source.allow_nan,
        compute=source.compute,
        left_out=source.left_out,
        adapter=source.adapter,
        quantization=source.quantization,
    )


def _compared(folder: Path, source: Source, small: Program, context: Context) -> tuple[Source, Program]:
    """The model that the folder holds, traced: it must have the parameters of the cut graph, and compute the same.

    Raises:
        BackendError: it is another model.
    """
    asked, cut = f"the smaller model of {source.name}", "cut the graph in Python: sparsify.structure.shrink.shrink"
    try:
        smaller = open_smaller(folder, source)
        program = capture(smaller, small.zero_batch() | small.literals)
    except TraceError as error:
        raise BackendError(
            asked,
            found=f"a module of it has a width built in ({error.found})",
            do=f"Leave its heads out (--only '*mlp*', say), or {cut}",
        ) from error
    except CheckpointError as error:
        raise BackendError(
            asked,
            found=f"config.json cannot say all of its widths ({error.found})",
            do="Leave some groups out (--ignore, --only): sparsify inspect MODEL --dimensions names them",
        ) from error
    for name in small.weights.parameters():
        if name not in program.weights or not same_bits(program.weights.read(name), small.weights.read(name)):
            raise BackendError(
                asked,
                found=f"{name} is another one in the model that config.json builds",
                do="Report this as a bug, with the model",
            )
    if (why := difference(small, program)) is not None:
        raise BackendError(
            asked,
            found=f"config.json builds a model that computes otherwise ({why})",
            do=f"Leave these groups out (--ignore), or {cut}",
        )
    return smaller, program
