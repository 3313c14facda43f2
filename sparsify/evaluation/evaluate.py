"""``evaluate``: how good a model is on text. What is measured is :mod:`sparsify.quality`'s."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.compiler.result import Compiled
from sparsify.context import Context, Observer
from sparsify.data.chat import Chat
from sparsify.data.given import named_or_given
from sparsify.frontend.source import Source, open_source, require_real
from sparsify.host import cpu_by_default, resolve_device
from sparsify.progress import Shown, shown
from sparsify.quality.evaluation import Evaluation, measure
from sparsify.quality.heldout import windows_of
from sparsify.words import check_amount, parse_bytes


@cpu_by_default()
def evaluate(
    model: str | Path | nn.Module | Compiled,
    data: str | Path | Iterable[str] | Tensor,
    *,
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
) -> Evaluation:
    """Perplexity of a causal language model on ``data``, by the papers' protocol: disjoint windows, mean loss of each.

    Args:
        model: a folder (ordinary, packed or of ragged widths), a hub id, a GGUF file, a module in memory, or what
            :func:`sparsify.compile` returned.
        data: a source's name or path (of sources in parts the held-out part is read), texts, or token ids
            [windows, length], which are taken as they are.
        tokenizer: of a module in memory, where ``data`` is text; in place of a folder's own.
        windows: evaluate on the first so many windows only.
        sequence_length: tokens of each; None: 2048, or as many as the model has positions for.
        memory: bytes of activations that are kept, as a number or as "8GiB"; more go to a file.
        progress: as for :func:`sparsify.compile`.
        observe: as for :func:`sparsify.compile`.
        check: hold the bytes of a folder of ours against its ``sparsify.json``.
        allow_nan: let NaN in tensors pass.
        compute_dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``: what the model runs in; None: its own.
        chat_template: the file of a Jinja template for chat messages, in place of the tokenizer's own.
        strict: refuse tensors that the model's class has no place for; else they are passed over.
        adapter: ``"merge"``: add a LoRA adapter of peft in the folder to the weights; None refuses one.

    Raises:
        CalibrationError: data that is missing or too short, or a perplexity that is no number.
        CheckpointError: no such model, or no tokenizer for text. SpecError: a result that is no model's.
        TraceError: no causal language model.
    """
    check_amount(windows, sequence_length)
    context = Context(resolve_device(device), parse_bytes(memory))
    with shown(progress, observe):
        if isinstance(model, Compiled):
            source = _compiled(model, tokenizer)
        else:
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
        chat = Chat(source, chat_template)
        ids, label = windows_of(named_or_given(data), source, windows, sequence_length, chat)
        chat.check_used(f"'{data}'" if isinstance(data, (str, Path)) else label)
        return measure(source, ids, label, context)


def _compiled(model: Compiled, tokenizer: Any) -> Source:
    """The model of a compile, with the weights as its passes left them."""
    model.check_holds("evaluating it")
    source = replace(model.source, weights=model.program.weights)
    return source if tokenizer is None else replace(source, given_tokenizer=tokenizer)
