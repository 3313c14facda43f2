"""Tokens a second of two models, in one process and in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from sparsify.backends.packed.bench.benchmark import Speed
from sparsify.context import counted


def prefill_speed(dense: Any, packed: Any, inputs: dict[str, torch.Tensor], rounds: int) -> tuple[Speed, int]:
    length = inputs["input_ids"].shape[1] if "input_ids" in inputs else 1
    times = _in_turns(lambda m: m(**inputs), dense, packed, rounds, "the prompt")
    return Speed.of(length, times), length


def decode_speed(dense: Any, packed: Any, ids: torch.Tensor, tokens: int, rounds: int) -> tuple[Speed, bool]:
    """Greedy generation: the time of tokens + 1 less that of one, which is the prompt's."""
    mask = torch.ones_like(ids)
    # transformers compiles a static cache's steps and replays them as CUDA graphs, so that no launch is waited for.
    cache = {"cache_implementation": "static"} if ids.is_cuda else {}

    def generate(model: Any, count: int) -> torch.Tensor:
        out: torch.Tensor = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
            pad_token_id=0,
            **cache,
        )
        return out

    same = bool(torch.equal(generate(dense, tokens), generate(packed, tokens)))
    whole = _in_turns(lambda m: generate(m, tokens + 1), dense, packed, rounds, "generation")
    first = _in_turns(lambda m: generate(m, 1), dense, packed, rounds, "the first token")
    return Speed.of(tokens, [(a[0] - b[0], a[1] - b[1]) for a, b in zip(whole, first, strict=True)]), same


def _in_turns(
    call: Callable[[Any], object], dense: Any, packed: Any, rounds: int, what: str
) -> list[tuple[float, float]]:
    """Seconds of (dense, packed) in each round, after one that does not count."""
    times = []
    for number in counted("timing", range(rounds + 1), unit="round", what=what):
        pair = []
        for model in (dense, packed):
            _wait(model)
            start = time.perf_counter()
            call(model)
            _wait(model)
            pair.append(time.perf_counter() - start)
        if number:
            times.append((pair[0], pair[1]))
    return times


def _wait(model: Any) -> None:
    """Until a GPU has done what it was given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
