"""Tokens a second of two models, in one process and in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from sparsify.backends.bench.benchmark import Speed
from sparsify.backends.bench.contender import Contender, Generated, Reader
from sparsify.context import counted

Pair = tuple[Contender, Contender]
Model = TypeVar("Model", bound=Reader)
Found = TypeVar("Found")


def prefill_speed(pair: Pair, inputs: Mapping[str, Tensor], rounds: int) -> Speed:
    """Prompt tokens a second; images a second, of a model of images."""
    length = inputs["input_ids"].shape[1] if "input_ids" in inputs else 1
    return Speed.of(
        length, _in_turns(lambda model: _spent(lambda: model.forward(inputs))[0], pair, rounds, "the prompt")
    )


def decode_speed(pair: Pair, ids: Tensor, tokens: int, rounds: int) -> tuple[Speed, bool]:
    """Greedy generation after the first token, which is the prompt's; and whether both make the same tokens."""
    made = _in_turns(lambda model: model.generate(ids, tokens + 1), pair, rounds, "generation")
    same = all(torch.equal(one.tokens, other.tokens) for one, other in made)
    return Speed.of(tokens, [(one.seconds, other.seconds) for one, other in made]), same


def reading_speed(pair: tuple[Reader, Reader], ids: Tensor, tokens: int, rounds: int) -> tuple[Speed, ...]:
    """Prompt tokens a second and a second of processor time (of all threads), then the same of generation."""
    read = _in_turns(lambda model: _spent(lambda: model.read_prompt(ids)), pair, rounds, "the prompt")
    made = _in_turns(lambda model: _by_both(model.generate(ids, tokens + 1)), pair, rounds, "generation")
    return tuple(
        Speed.of(count, [(one[clock], other[clock]) for one, other in found])
        for count, found in ((ids.shape[1], read), (tokens, made))
        for clock in (0, 1)
    )


def _by_both(made: Generated) -> tuple[float, float]:
    return made.seconds, made.cpu


def _in_turns(
    call: Callable[[Model], Found], pair: tuple[Model, Model], rounds: int, what: str
) -> list[tuple[Found, Found]]:
    """What ``call`` gives of both in each round, after one that does not count."""
    found = []
    for number in counted("timing", range(rounds + 1), unit="round", what=what):
        one, other = (call(model) for model in pair)
        if number:
            found.append((one, other))
    return found


def _spent(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock, and of processor time of all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu
