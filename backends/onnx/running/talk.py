"""Text in, text out, from a folder with a tokenizer: what ``sparsify run`` prints."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsify.backends.onnx.running.runner import Runner, Sampling
from sparsify.errors import CheckpointError, SpecError, first_line
from sparsify.files.reading import read_json
from sparsify.words import check_seed, check_threads


@dataclass(frozen=True)
class Piece:
    """Text that one more token made certain; ``rate``: tokens a second after the first, ``first``: its seconds."""

    text: str
    count: int
    rate: float
    first: float


def talk(
    folder: Path,
    prompt: str,
    *,
    tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
    device: str = "cpu",
    threads: int = 0,
    check: bool = True,
) -> Iterator[Piece]:
    """The prompt, then what the model makes of it, piece by piece; ``check``: as for :class:`Runner`.

    Raises:
        CheckpointError, BackendError: no graph that generates, or no tokenizer beside it.
        SpecError: a prompt of no tokens, or a seed, temperature or number of threads that is none.
    """
    check_seed(seed)
    if not 0 <= temperature < math.inf:
        raise SpecError(f"temperature {temperature}", found="no number from 0 on", do="Give --temperature 1, say")
    check_threads(threads)
    runner = Runner(folder, device=device, threads=threads, check=check)
    tokenizer = folder_tokenizer(runner.folder)
    ids = np.asarray([tokenizer(prompt)["input_ids"]], np.int64)
    if not ids.size:
        raise SpecError(f"prompt '{prompt}'", found="the tokenizer makes no token of it", do="Give some text")
    stop, written = _stop_tokens(runner.folder), ids[0].tolist()
    shown = tokenizer.decode(written, skip_special_tokens=True)
    yield Piece(shown, 0, 0.0, 0.0)
    start = time.perf_counter()
    first = 0.0
    steps = runner.generate(ids, tokens=tokens, sampling=Sampling(temperature, top_k, seed))
    for count, chosen in enumerate(steps, 1):
        first = first or time.perf_counter() - start
        token = int(chosen[0])
        ended = token in stop
        if not ended:
            written.append(token)
        text = tokenizer.decode(written, skip_special_tokens=True)
        # A character of several tokens shows as a replacement until its last one came.
        new = "" if text.endswith("\ufffd") and not ended else text[len(shown) :]
        shown += new
        seconds = time.perf_counter() - start - first
        yield Piece(new, count, (count - 1) / seconds if count > 1 and seconds else 0.0, first)
        if ended:
            return


def folder_tokenizer(folder: Path) -> Any:
    """The tokenizer in ``folder``.

    Raises:
        CheckpointError: none that loads.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # of many kinds
        raise CheckpointError(
            f"a tokenizer in {folder}",
            found=f"none that loads ({first_line(error)})",
            do="Copy the model's tokenizer files there",
        ) from error


def _stop_tokens(folder: Path) -> set[int]:
    """Tokens that end a text, by the folder's generation config or config."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            value = read_json(folder / name).get("eos_token_id")
            if value is not None:
                tokens = value if isinstance(value, list) else [value]
                if not all(type(token) is int for token in tokens):
                    raise CheckpointError(
                        f"eos_token_id of {folder / name}", found=f"{value!r}", do="It is a token id or a list of them"
                    )
                return set(tokens)
    return set()
