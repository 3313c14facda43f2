"""Recover a pruned model by training it: LoRA or all weights, zeros held. ``sparsify tune``.

The mask is what is zero in the weights when it begins, and stays so: all weights have it applied after every step,
LoRA is merged under it. Whether it held is verified before anything is written.

LoRA's defaults are LLM-Pruner's (algorithms.md, section 9.5): rank 8, alpha 16, dropout 0.05 on every linear layer of
the blocks, AdamW, 3e-4 with a warm-up of 100 steps and a linear decay, 64 sequences a step in micro-batches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsify.compiler.backend import Backend, as_backend
from sparsify.compiler.keeping.dividing import agree_on_model, check_world
from sparsify.compiler.recipe import as_typed, backend_text
from sparsify.context import Context
from sparsify.data.batches import Calibration, evaluation_windows, example_batch, load_calibration
from sparsify.data.chat import Chat
from sparsify.data.inputs import default_length
from sparsify.data.sources import check_named, same_source
from sparsify.errors import CalibrationError, SpecError
from sparsify.files.staging import check_output
from sparsify.frontend.capture import capture
from sparsify.frontend.source import open_source
from sparsify.host import cpu_by_default, within_memory
from sparsify.provenance.history import run_date
from sparsify.quality.perplexity import perplexity
from sparsify.tensors import BLAKE, digest
from sparsify.tuning.distillation import Distillation
from sparsify.tuning.masks import check_masks, masks_of
from sparsify.tuning.network import build_network
from sparsify.tuning.output import Output, merged, write_adapter
from sparsify.tuning.overlap import apart
from sparsify.tuning.recipe import Recipe, Tuned
from sparsify.tuning.state import TuneState, check_resumable
from sparsify.tuning.targets import find_targets, kinds_of, linear_layers
from sparsify.tuning.teacher import known, open_for, weights_digest
from sparsify.tuning.training import Training, orders, parts
from sparsify.world.world import ALONE, World


@cpu_by_default()
def tune(
    model: str | Path,
    data: str,
    output: str | Path,
    recipe: Recipe | None = None,
    *,
    to: str | Backend = "hf",
    adapter: bool = False,
    resume: bool = False,
    save_every: int = 100,
    device: torch.device | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    check: bool = True,
    allow_nan: bool = False,
    chat_template: str | Path | None = None,
    validation: str | None = None,
    teacher: str | Path | nn.Module | None = None,
    world: World = ALONE,
    observe: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> Tuned:
    """Train the causal language model of the folder ``model`` on ``data`` and write it to ``output``.

    Args:
        data: a source's name, as for calibration.
        validation: another source's name; None: of sources in parts the held-out one, of others the last tenth, which
            is not trained on then. Sequences of ``data`` that stand in it are left out.
        teacher: a model whose predictions are learnt, in place of the text's next tokens: the dense one, mostly. It
            must have the same tokens, and may have another shape.
        chat_template: the file of a Jinja template for chat messages, in place of the tokenizer's own.
        to: the backend that writes the result, as for :func:`sparsify.compile`.
        adapter: write LoRA's additions alone, as a folder of ``peft``, and not the merged model.
        resume: go on from ``OUTPUT.tuning``, where the state is kept every ``save_every`` steps until it is done, with
            the same model, recipe, data (the sequences drawn from it) and teacher.
        check: hold the bytes of a folder of ours against its ``sparsify.json``. allow_nan: let NaN in tensors pass.
        world: processes that share the sequences of every step, all of which call this alike (:func:`sparsify.join`);
            the first keeps the state and writes. Each has the whole model.
        observe: told (step, steps, loss); of all else :func:`sparsify.context.observed` tells.

    Raises:
        SpecError: a recipe that cannot be meant, targets that are not there, or a teacher that cannot teach this model.
        CalibrationError: data too short, too little memory, or a loss or perplexity that is no number.
        VerifyError: a mask that broke.
        CheckpointError, TraceError: no causal language model there.
        ProcessError: fewer micro-batches in a step than processes, or one that was asked otherwise or failed.
    """
    recipe, out, place = recipe or Recipe(), Path(output), device or torch.device("cpu")
    if adapter and recipe.method != "lora":
        raise SpecError("an adapter of full tuning", found="only LoRA makes one", do="Take --method lora")
    check_world(world)
    parts(torch.arange(recipe.batch), recipe, world)
    backend = as_backend(to)
    if adapter and backend.name != "hf":
        raise SpecError(f"an adapter --to {backend.name}", found="a folder of peft's own form", do="Leave --to out")
    if recipe.distill is not None and teacher is None:
        raise SpecError(f"distill {recipe.distill:g}", found="no teacher", do="Give --teacher, or leave --distill out")
    words = words_of(model, data, recipe, validation, teacher, backend, chat_template)
    check_named(data, validation)
    told_so = {"adapter": adapter, "no_check": not check, "allow_nan": allow_nan}
    asked = run_date(), words if words is None else words | {key: True for key, value in told_so.items() if value}
    if resume and world.leads:
        check_resumable(out)
    with ExitStack() as stack:
        claim = check_output(out, overwrite=overwrite, source=Path(model)) if world.leads else None
        if claim is not None:
            stack.enter_context(claim)
        opening: dict[str, Any] = {"trust_remote_code": trust_remote_code, "check": check, "allow_nan": allow_nan}
        source = open_source(model, **opening)
        layers = find_targets(linear_layers(source.module), recipe.target_names) if recipe.targets is not None else []
        dense = None if teacher is None else open_for(source, teacher, **opening)
        length = recipe.length or default_length(source, 256)
        chat, judged = Chat(source, chat_template), validation or data
        both = same_source(data, judged)
        held_out, told = evaluation_windows(judged, source, length, 32, chat, both=both)
        drawn = load_calibration(
            data, source, samples=recipe.samples, sequence_length=length, seed=recipe.seed, chat=chat, both=both
        )
        chat.check_used(f"'{data}'")
        every = torch.cat([batch["input_ids"] for batch in drawn.batches])
        # The two parts of one source have nothing in common; of two sources nobody knows.
        ids = every if both else every[apart(every, held_out)]
        if len(ids) < recipe.batch:
            raise _too_few(drawn, told, len(every) - len(ids), recipe)
        context = Context(place)
        program = capture(source, example_batch(source))
        own = weights_digest(source.weights)
        drawn_ids = digest(ids.contiguous())
        asked_of_all = {**recipe.as_dict(), "data": drawn_ids, "held-out text": digest(held_out)}
        agree_on_model(source, {**asked_of_all, "resume": resume, "weights of the model": own}, world)
        record = None if dense is None else known(dense, own, program, held_out, context)
        before = world.told(perplexity(source, held_out, context) if world.leads else None)[0]
        masks = masks_of(program)
        less = "Take fewer sequences at once (--micro), shorter ones (--sequence-length) or --device cpu"
        with within_memory(f"tuning {source.name}", place, less):
            network, wrapped = build_network(source, recipe, place, layers)
            if world.divided:
                # All began with one network; what LoRA drops is drawn anew for each process's sequences.
                torch.manual_seed(recipe.seed + world.rank)
            origins = {"model": own, "data": drawn_ids}
            origins |= {} if record is None else {"teacher": record[BLAKE]}
            state = stack.enter_context(
                TuneState.of(out, recipe, wrapped, resume=resume, source=source.folder, origins=origins, world=world)
            )
            started = time.perf_counter()
            steps = recipe.steps or max(1, recipe.epochs * len(ids) // recipe.batch)
            lessons, numbers = None, list(orders(len(ids), recipe, steps))[state.step :]
            if dense is not None and numbers:
                share = 0.5 if recipe.distill is None else recipe.distill
                mine = torch.cat([part for chosen in numbers for part in parts(chosen, recipe, world)])
                lessons = stack.enter_context(Distillation.of(dense, ids, mine.unique(), share, context))
            training = Training(wrapped, network, ids, recipe, steps, masks, place, lessons, world)
            training.run(state, save_every, observe)
            seconds = time.perf_counter() - started
        result = Tuned(
            recipe,
            out,
            state.step,
            state.step * recipe.batch * length,
            seconds,
            (before, math.nan),
            told,
            len(masks),
            drawn.label,
            state.losses,
            len(every) - len(ids),
            kinds_of(layers),
            record,
        )
        if not world.leads:
            # The first one writes.
            return replace(result, perplexity=(before, world.told(None)[0]))
        with within_memory(f"what tuning {source.name} gave", place, less):
            if claim is not None:
                claim.release()
            if adapter:
                tuned = write_adapter(source, wrapped, result, held_out, overwrite, asked)
                state.forget()
                world.told(tuned.perplexity[1])
                return tuned
            new = merged(wrapped, source, masks, recipe)
        check_masks(new, masks)
        after = Output(source, program, backend, overwrite, asked).write(new, result, held_out, context)
        state.forget()
        world.told(after)
        return replace(result, perplexity=(before, after))


def words_of(
    model: str | Path,
    data: str,
    recipe: Recipe,
    validation: str | None,
    teacher: str | Path | nn.Module | None,
    backend: Backend,
    template: str | Path | None,
) -> dict[str, Any] | None:
    """The words of a run, as its history keeps them; None where the teacher is in memory alone."""
    if isinstance(teacher, nn.Module):
        return None
    told = {"model": as_typed(model), "data": data, "validation": validation, "teacher": as_typed(teacher)}
    told |= {"to": backend_text(backend), "chat_template": as_typed(template), **recipe.words()}
    return {key: value for key, value in told.items() if value is not None and (key, value) != ("to", "hf")}


def _too_few(drawn: Calibration, validation: str, left_out: int, recipe: Recipe) -> CalibrationError:
    if left_out:
        return CalibrationError(
            f"tuning on {drawn.size}",
            found=f"{left_out} of them stand in the text that is validated on ({validation}), and the others are fewer "
            f"than one step of {recipe.batch} sequences",
            do="Validate on other text, or leave --validation out: then a tenth of --data is held out",
        )
    return CalibrationError(
        f"tuning on {drawn.size}",
        found=f"fewer than one step of {recipe.batch} sequences",
        do="Give more --samples, or a smaller --batch",
    )
