"""Calibration without data: sequences sampled from the model itself, seeded (``--calibration self``)."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sparsify.context import Progress, report
from sparsify.errors import CalibrationError, first_line
from sparsify.frontend.materialize import materialize
from sparsify.frontend.source import Source
from sparsify.frontend.text_config import text_config
from sparsify.runtime.cpu.wide import wide_products

_BATCH = 32


def writes_text(source: Source) -> bool:
    """Whether the model goes on from a first token alone."""
    can_generate: bool = getattr(source.module, "can_generate", lambda: False)()
    return can_generate and not getattr(source.config, "is_encoder_decoder", False)


def sample_from_model(source: Source, samples: int, length: int, seed: int) -> Tensor:
    """Sample [samples, length] token ids from the model, from its first token on.

    Plain sampling within the most likely 95% at temperature 1, whatever the model's own generation config says; the end
    token does not stop a sequence, so that all are whole. The global random state is left as it was.

    Raises:
        CalibrationError: the model cannot generate, or would not fit into memory.
    """
    from transformers import GenerationConfig

    if not writes_text(source):
        raise CalibrationError(
            "calibration 'self'",
            found=f"{type(source.module).__name__} does not generate text from nothing",
            do="Give --calibration a text file or another source",
        )
    report(Progress("loading", what=f"{source.name}, whole, to sample from it"))
    model = _load(source)
    training, inherited = model.training, model.generation_config
    model.eval()
    text = text_config(model.config)
    start = getattr(text, "bos_token_id", None)
    start = start if isinstance(start, int) and 0 <= start < (source.vocab_size or start + 1) else 0
    settings = GenerationConfig(
        max_length=length,
        min_length=length,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=0.95,
        num_beams=1,
        pad_token_id=start,
        use_cache=True,
    )
    parts: list[Tensor] = []
    # A seed is set on every GPU that this process has used.
    used = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        # What settings leave open generate() would take from the model's own, which are meant for chatting.
        model.generation_config = GenerationConfig()
        with torch.random.fork_rng(devices=used), torch.no_grad(), wide_products():
            torch.manual_seed(seed)
            for begin in range(0, samples, _BATCH):
                first = torch.full((min(_BATCH, samples - begin), 1), start, device=model.device)
                with _counting(model, begin, samples, len(first), length):
                    parts.append(_sample(model, first, settings, length))
    finally:
        model.generation_config = inherited
        model.train(training)
    return torch.cat(parts)


@contextmanager
def _counting(model: Any, begin: int, samples: int, rows: int, length: int) -> Iterator[None]:
    """Tell how many sequences there are: rows grow together, one forward gives each its next token."""
    forwards = itertools.count(1)

    def tell(*_: Any) -> None:
        done = begin + rows * min(1.0, next(forwards) / max(1, length - 1))
        report(Progress("sampling", done, samples, "from the model itself"))

    report(Progress("sampling", begin, samples, "from the model itself"))
    hook = model.register_forward_hook(tell)
    try:
        yield
    finally:
        hook.remove()


def _sample(model: Any, first: Tensor, settings: Any, length: int) -> Tensor:
    """[rows, length] token ids that begin with ``first`` [rows, 1]."""
    try:
        made = model.generate(first, attention_mask=torch.ones_like(first), generation_config=settings)
    except Exception as error:  # a model's own code, which raises whatever it likes
        raise CalibrationError(
            "calibration 'self'",
            found=f"{type(model).__name__} does not generate ({type(error).__name__}: {first_line(error)})",
            do="Give --calibration a text file or another source",
        ) from error
    if not isinstance(made, Tensor) or made.shape != (len(first), length):
        shape = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
        raise CalibrationError(
            "calibration 'self'",
            found=f"{type(model).__name__} generates {shape} where {(len(first), length)} tokens were asked for",
            do="Give --calibration a text file or another source",
        )
    return made.cpu()


def _load(source: Source) -> Any:
    if source.folder is None:
        return source.module if source.compute is None else copy.deepcopy(source.module).to(source.compute)
    need = sum(p.numel() * p.element_size() for p in source.module.parameters())
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if need > 0.8 * have:
        raise CalibrationError(
            "calibration 'self'",
            found=f"generating needs the whole model in memory ({need / 1e9:.1f} GB; {have / 1e9:.1f} GB are free)",
            do="Give --calibration a text file or another source, which needs one block at a time",
        )
    if source.quantization is not None or source.adapter is not None:
        # transformers may not read it here, or read other numbers.
        made = materialize(source, source.weights, set(source.weights.parameters()))
        return made if source.compute is None else made.to(source.compute)
    from transformers import GenerationConfig

    # The folder's own settings are not even read: they are the user's, and may be anything.
    options = {"generation_config": GenerationConfig(), "trust_remote_code": source.trust_remote_code}
    try:
        return type(source.module).from_pretrained(  # type: ignore[attr-defined]
            source.folder, dtype=source.compute or "auto", local_files_only=True, **options
        )
    except Exception as error:  # transformers' loading raises many kinds
        raise CalibrationError(
            "calibration 'self'",
            found=f"transformers does not load {source.folder} ({first_line(error)})",
            do="Give --calibration a text file or another source",
        ) from error
