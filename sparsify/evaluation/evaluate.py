"""``evaluate``: how good a model is on text, by tasks, on pictures. What is measured is :mod:`sparsify.quality`'s."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.compiler.keeping.dividing import agree_on_model, check_world
from sparsify.compiler.result import Compiled
from sparsify.context import Context, Observer
from sparsify.data.chat import Chat
from sparsify.data.given import named_or_given
from sparsify.data.sources import check_named
from sparsify.errors import SpecError
from sparsify.files.manifest import digest_of_manifest, sealed_manifest
from sparsify.files.reading import kind_at
from sparsify.frontend.source import Source, check_tokenizer, open_source, require_real
from sparsify.host import cpu_by_default, resolve_device
from sparsify.progress import Shown, shown
from sparsify.quality.evaluation import Evaluation, measure, of_scores
from sparsify.quality.graphs import Graph, open_graph
from sparsify.quality.heldout import windows_of
from sparsify.quality.pictures.accuracy import is_folder, on_pictures, takes_pictures
from sparsify.quality.tasks.answering import answer, language_model, notes, ready
from sparsify.quality.tasks.chosen import Named, named
from sparsify.quality.tasks.names import check_asked
from sparsify.tensors import digest
from sparsify.words import check_amount, check_windows, parse_bytes, paths_given
from sparsify.world.world import ALONE, World


@cpu_by_default()
def evaluate(
    model: str | Path | nn.Module | Compiled,
    data: str | Path | Iterable[str] | Tensor | None = None,
    *,
    tasks: str | Path | Sequence[str | Path] | Named | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    include: str | Path | Sequence[str | Path] = (),
    batch_size: int = 8,
    tokenizer: Any = None,
    windows: int | None = None,
    sequence_length: int | None = None,
    device: str = "auto",
    memory: int | str = "8GiB",
    progress: Shown = False,
    observe: Observer | None = None,
    allow_bin: bool = False,
    trust_remote_code: bool = False,
    check: bool = True,
    allow_nan: bool = False,
    compute_dtype: str | torch.dtype | None = None,
    chat_template: str | Path | None = None,
    strict: bool = False,
    adapter: str | None = None,
    world: World = ALONE,
) -> Evaluation:
    """How good a model is: perplexity on text by the papers' protocol (disjoint windows, mean loss of each), accuracy
    by tasks of lm-eval, and for image classifiers top-1 and top-5 on a folder of pictures.

    Args:
        model: a folder (ordinary, packed or of ragged widths), a hub id, a GGUF file, a module in memory, or what
            :func:`sparsify.compile` returned. For tasks and pictures an ONNX folder too, which onnxruntime runs.
        data: a source's name or path (of sources in parts the held-out part is read), texts, or token ids
            [windows, length], which are taken as they are; for image classifiers a folder with one folder of pictures
            for each class. None: tasks alone.
        tasks: names of lm-eval's tasks and groups, ``wanda7``, YAML files or folders of them; one, several, or a text
            with commas between. Needs ``pip install 'sparsify-fx[eval]'``.
        num_fewshot: examples before each question; None: as each task says.
        limit: the first so many documents of each task; of pictures so many, spread over all classes.
        include: folders of YAML files whose tasks ``tasks`` may name. batch_size: questions or pictures at a time.
        tokenizer: of a module in memory, where ``data`` is text; in place of a folder's own.
        windows: evaluate on the first so many windows only.
        sequence_length: tokens of each; None: 2048, or as many as the model has positions for.
        memory: bytes of activations that are kept, as a number or as "8GiB"; more go to a file. Tasks and pictures
            take the whole model into memory.
        progress: as for :func:`sparsify.compile`.
        observe: as for :func:`sparsify.compile`.
        check: hold the bytes of a folder of ours against its ``sparsify.json``.
        allow_nan: let NaN in tensors pass.
        compute_dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``: what the model runs in; None: its own.
        chat_template: the file of a Jinja template for chat messages, in place of the tokenizer's own.
        strict: refuse tensors that the model's class has no place for; else they are passed over.
        adapter: ``"merge"``: add a LoRA adapter of peft in the folder to the weights; None refuses one.
        world: processes that share windows of text, questions and pictures; all of them call this alike
            (:func:`sparsify.join`) and are given the same result, that of one process.

    Raises:
        CalibrationError: data that is missing or too short, a task's that cannot be had, a broken picture, or a
            perplexity that is no number.
        CheckpointError: no such model, or no tokenizer for text. SpecError: a result that is no model's; no such
            task; nothing to evaluate on. TraceError: no causal language model. BackendError: an ONNX folder that does
            not run, or that was asked to write text. ProcessError: fewer batches of windows than processes, or one
            that was asked otherwise or failed.
    """
    places = paths_given(include, "--include")
    check_windows(windows)
    check_amount(None, sequence_length)
    check_asked(tasks, num_fewshot, bool(places), limit, batch_size)
    if data is None and tasks is None:
        raise SpecError("evaluating", found="neither data nor tasks", do="Give data (a text's name), tasks, or both")
    if data is None:
        _check_no_text(windows, sequence_length, "tasks alone, and no text that it could be meant for")
    if isinstance(data, Path):
        data = str(data)
    check_named(data)
    check_world(world)
    context = Context(resolve_device(device), parse_bytes(memory), world=world)
    with shown(progress, observe):
        wanted = None if tasks is None else named(tasks, places)
        # Text is read by the weights beside a graph, as far as there are any.
        graph = open_graph(model, device=device, check=check) if tasks is not None or is_folder(data) else None
        text = data is not None and not (graph is not None and takes_pictures(graph))
        source: Source | None = None
        if isinstance(model, Compiled):
            source = _compiled(model, tokenizer)
        elif graph is None or text:
            if isinstance(model, nn.Module):
                require_real(model)
            source = open_source(
                model,
                allow_bin=allow_bin,
                trust_remote_code=trust_remote_code,
                check=check,
                allow_nan=allow_nan,
                compute_dtype=compute_dtype,
                strict=strict,
                adapter=adapter,
                tokenizer=tokenizer,
            )
        asked = graph or source
        assert asked is not None, "what is no graph was opened"
        chosen = None if wanted is None else ready(wanted, asked, num_fewshot)
        seal = _seal(model) if check and adapter is None else None
        found = of_scores((), 0.0)
        if data is not None and takes_pictures(asked):
            _check_no_text(windows, sequence_length, f"{asked.name}, which looks at pictures")
            _agree(asked, {"pictures at a time": batch_size}, world)
            found = on_pictures(asked, data, context, limit, batch_size)
        elif data is not None:
            assert source is not None, "text is read by what torch runs"
            chat = Chat(source, chat_template)
            ids, label = windows_of(named_or_given(data), source, windows, sequence_length, chat)
            chat.check_used(f"'{data}'" if isinstance(data, (str, Path)) else label)
            agree_on_model(source, {"windows": digest(ids), "dtype": str(source.compute)}, world)
            found = measure(source, ids, label, context)
        if chosen is None:
            return replace(found, manifest=seal)
        started = time.perf_counter()
        _agree(
            asked, {"tasks": list(chosen.tasks), "examples": num_fewshot, "limit": limit, "batch": batch_size}, world
        )
        model_of_tasks = language_model(asked, context.device, batch_size, world)
        scores = answer(model_of_tasks, chosen, asked.name, context.device, limit)
        seconds = found.seconds + time.perf_counter() - started
        return replace(found, scores=tuple(scores), notes=notes(model_of_tasks), seconds=seconds, manifest=seal)


def _agree(model: Source | Graph, asked: Mapping[str, Any], world: World) -> None:
    """Raises:
    ProcessError: another process was asked otherwise, or sees another model.
    """
    if isinstance(model, Source):
        agree_on_model(model, asked, world)
    else:
        world.agree({**asked, "model": model.name})


def _check_no_text(windows: int | None, sequence_length: int | None, found: str) -> None:
    """That nothing was said of text, of which there is none: ``found`` is there."""
    for word, given in (("--windows", windows), ("--sequence-length", sequence_length)):
        if given is not None:
            raise SpecError(word, found=found, do="Give --limit N for the first N documents or pictures")


def _seal(model: object) -> str | None:
    """The digest of ``sparsify.json`` of the folder that ``model`` is or lies in; None where there is none."""
    place = model.output if isinstance(model, Compiled) else model
    if not isinstance(place, (str, Path)):
        return None
    path = Path(place).expanduser()
    path = path.parent if path.suffix == ".onnx" else path
    manifest = sealed_manifest(path) if kind_at(path) == "folder" else {}
    return digest_of_manifest(manifest) if manifest else None


def _compiled(model: Compiled, tokenizer: Any) -> Source:
    """The model of a compile, with the weights as its passes left them."""
    model.check_holds("evaluating it")
    check_tokenizer(tokenizer)
    source = replace(model.source, weights=model.program.weights)
    return source if tokenizer is None else replace(source, given_tokenizer=tokenizer)
