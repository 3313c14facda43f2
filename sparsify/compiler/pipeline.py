"""``compile()``: the one function behind the command line. Model in; passes in the order given; output out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.compiler import stages
from sparsify.compiler.backend import Backend, settle
from sparsify.compiler.judging import open_judge
from sparsify.compiler.keeping.dividing import agree, agree_on_data, check_divided
from sparsify.compiler.keeping.job import asked_of, look_first, open_journal
from sparsify.compiler.recipe import recipe_of
from sparsify.compiler.request import Data, parse
from sparsify.compiler.result import Compiled
from sparsify.compiler.seam import After, Seam, nobody
from sparsify.context import Context, Observer
from sparsify.host import cpu_by_default, resolve_device, within_memory
from sparsify.method.base import Pass
from sparsify.progress import Shown, shown
from sparsify.provenance.history import run_date
from sparsify.quantized.otherwise import seems_stored_otherwise
from sparsify.words import Schedule, parse_bytes
from sparsify.world.world import ALONE, World


def untold(text: str) -> None:
    """Whoever is told and says nothing."""


@cpu_by_default()
def compile(
    model: str | Path | nn.Module,
    passes: str | Pass | Sequence[str | Pass | Mapping[str, Any]] = (),
    *,
    calibration: Data = None,
    tokenizer: Any = None,
    schedule: Schedule = "layer",
    output: str | Path | None = None,
    to: str | Backend = "hf",
    samples: int | None = None,
    sequence_length: int | None = None,
    seed: int = 0,
    ignore: str | Sequence[str] = (),
    only: str | Sequence[str] = (),
    device: str = "auto",
    memory: int | str = "8GiB",
    overwrite: bool = False,
    allow_bin: bool = False,
    trust_remote_code: bool = False,
    check: bool = True,
    allow_nan: bool = False,
    compute_dtype: str | torch.dtype | None = None,
    chat_template: str | Path | None = None,
    strict: bool = False,
    adapter: str | None = None,
    dtype: str | torch.dtype | None = None,
    teacher: str | Path | nn.Module | None = None,
    evaluate: str | Path | Iterable[str] | Tensor | None = None,
    eval_windows: int | None = None,
    dry_run: bool = False,
    journal: bool = True,
    resume: bool = False,
    checkpoint_every: int | None = None,
    world: World = ALONE,
    progress: Shown = False,
    observe: Observer | None = None,
    tell: Callable[[str], None] = untold,
    after: After = nobody,
) -> Compiled:
    """Prune ``model`` and write the result.

    Args:
        model: a Hugging Face folder, a hub id, a GGUF file, or a module, which is left as it is.
        passes: a spec (``"wanda:2:4"``), several with ``+`` between (``"twin:2:4+refine"``), or a list of specs or
            pass objects, run in this order, each on the result of the one before; with names of its own one is
            ``{"pass": "wanda:2:4", "only": ["*mlp*"], "ignore": []}``: its ``only`` stands for that of all, its
            ``ignore`` comes to it.
        calibration: a source's name or path (see docs/data.md), a list of texts, an iterable of LongTensors
            [batch, sequence] or of keyword dictionaries of the model's inputs, or what :func:`load_calibration`
            returned. None: C4 where the hub answers, else sampled from the model.
        tokenizer: of a model in memory, where ``calibration`` is text; in place of a folder's own.
        schedule: ``layer``, ``block`` (the papers') or ``dense``; see :mod:`sparsify.prune.engine`.
        to: the backend, as a spec (``"onnx:weights=packed"``) or an object: what to write.
        output: the folder to write; None keeps the result in memory.
        samples: how many sequences are drawn from a named source; None: 128, of ``self`` 32.
        sequence_length: tokens of each; None: 2048, or as many as the model has positions for.
        seed: of the drawing, and of whatever a pass draws.
        ignore: names, globs or ``re:`` patterns of parameters or modules that stay dense, one or several.
        only: the same, of those that are pruned and no others.
        device: where blocks run: ``"cpu"``, ``"cuda"``, …, or ``"auto"``.
        overwrite: replace ``output``: an older one or a model, and no other folder.
        allow_bin: read ``pytorch_model.bin`` (weights only, no code).
        trust_remote_code: run Python code that the model brings along.
        memory: bytes of activations kept on the GPU and in memory, as a number or as "8GiB".
        check: hold the bytes of a folder that sparsify wrote against its ``sparsify.json``; the output's says how.
        allow_nan: let NaN and infinity in tensors that are not pruned pass, which the output's manifest says then.
        compute_dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``: what calibration runs in; None: the model's own.
            What is written keeps the dtype that it was stored in.
        chat_template: the file of a Jinja template for chat messages, in place of the tokenizer's own.
        strict: refuse tensors that the model's class has no place for; else they are carried over, and listed.
        adapter: ``"merge"``: add a LoRA adapter of peft in the folder to the weights; None refuses one.
        dtype: of the same three, what the weights of a quantized model are read and written in; None: bfloat16.
        teacher: for ``refine``: the dense model, where it is not ``model`` itself before the other passes.
        evaluate: text that judges the result, as ``data`` of :func:`sparsify.evaluate`: the model before and what the
            passes made of it, on the same windows; ``result.evaluation`` and ``sparsify.json`` have both. Of a file
            that is ``calibration`` as well the last tenth is held out. None measures nothing.
        eval_windows: the first so many windows of it only; each of ``sequence_length`` tokens.
        dry_run: decide what would be pruned and stop there.
        journal: keep what is finished beside ``output`` until that is there, for ``resume``: as many bytes as are
            pruned.
        resume: go on where the same job was interrupted; the result is that of a run that was not.
        checkpoint_every: after so many blocks keep activations in the journal too, so that a run that goes on runs
            nothing again; None never does, for they are large.
        world: processes that share the work, all of which call this alike (:func:`sparsify.join`): each calibrates
            with its part of the batches and prunes its part of the weights; the first writes, and alone has an
            ``output``.
        tell: told in words, before the work, what a quantized model grows to.
        progress: True: show it, as the command line does; or a function that is told (:class:`sparsify.Progress`); or
            tqdm, or a bar of its kind.
        observe: told as well.
        after: told of every pass that has run, with the program.

    Raises:
        SparsifyError: see :mod:`sparsify.errors`; nothing is written then.

    >>> import torch, sparsify
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> pruned = sparsify.compile(net, "wanda:2:4", calibration=[torch.randn(16, 8)])
    >>> int((pruned.model[0].weight != 0).sum())
    32
    """
    request = parse(
        passes,
        to,
        schedule,
        calibration,
        samples=samples,
        length=sequence_length,
        only=only,
        ignore=ignore,
        output=output,
        overwrite=overwrite,
        dry_run=dry_run,
        template=chat_template,
        teacher=teacher,
        evaluate=evaluate,
        eval_windows=eval_windows,
        without_pass=not passes and seems_stored_otherwise(model),
        journal=journal,
        resume=resume,
        checkpoint_every=checkpoint_every,
    )
    request = replace(
        request,
        date=run_date(),
        recipe=recipe_of(
            model, request, seed=seed, allow_bin=allow_bin, no_check=not check, allow_nan=allow_nan, strict=strict,
            compute_dtype=compute_dtype, adapter=adapter, dtype=dtype,
        ),
    )  # fmt: skip
    context = Context(resolve_device(device), parse_bytes(memory), seed, world=world)
    check_divided(request, world)
    request = replace(request, processes=world.size)
    if not world.leads:
        # One process writes; what the others prune they need for what comes after it.
        request = replace(request, out=None)
    seam = Seam(context, after)
    asked = asked_of(request, context, {"compute dtype": compute_dtype, "dtype": dtype, "adapter": adapter})
    with shown(progress, observe), within_memory("compiling", context.device), ExitStack() as stack:
        place = stages.Workplace(stack, every=request.checkpoint_every or 0)
        world.says("loading and tracing the model")
        source = stages.open_model(
            model,
            request,
            place,
            allow_bin=allow_bin,
            trust_remote_code=trust_remote_code,
            check=check,
            allow_nan=allow_nan,
            compute_dtype=compute_dtype,
            strict=strict,
            adapter=adapter,
            dtype=dtype,
            tokenizer=tokenizer,
            tell=tell,
        )
        look_first(request, asked)
        planned, data = stages.plan(source, request, context)
        judge = open_judge(source, planned.model.program, request, context)
        if dry_run:
            return stages.as_plan(planned, judge)
        agree(source, request, asked if judge is None else {**asked, "text that judges": judge.digest}, world)
        dense = None if judge is None else judge.before(source)
        world.says("reading the calibration data")
        planned, data = stages.draw(planned, data, request, context, judge)
        agree_on_data(data, world)
        planned = stages.teach(
            planned, data, request, context,
            allow_bin=allow_bin, trust_remote_code=trust_remote_code, check=check, compute_dtype=compute_dtype,
            dtype=None,
        )  # fmt: skip
        if request.structural:
            place.begin(open_journal(source, planned.runs, data, planned.dense, request, asked, world))
        planned = stages.restructure(planned, data, request, seam, place)
        job = stages.open_output(planned, request, place, leads=world.leads)
        if not request.structural:
            # Only now: copying the weights for the output has told which they are.
            place.begin(open_journal(source, planned.runs, data, planned.dense, request, asked, world))
        compiled = stages.prune(planned, data, request, seam, place)
        settle(job, compiled.program)
        if judge is not None and dense is not None:
            compiled.evaluation = judge.after(compiled, dense)
        return stages.finish(compiled, job, request, source, place, context)
