"""What is timed: a model that takes a prompt and goes on from it, in torch or in onnxruntime."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sparsify.backends.onnx.running.runner import Runner
from sparsify.backends.onnx.running.session import config_beside, feed_of, find_onnx, open_session
from sparsify.backends.onnx.storage.store import check_written
from sparsify.backends.packed.loaded.loading import first_inputs
from sparsify.errors import BackendError, first_line


@dataclass(frozen=True)
class Generated:
    """``tokens`` [count], and the seconds from the first of them to the last: by the clock, and of processor time (all
    threads).
    """

    tokens: Tensor
    seconds: float
    cpu: float


class Reader(Protocol):
    """What takes a prompt and goes on from it."""

    def read_prompt(self, ids: Tensor) -> None:
        """Take ``ids`` [1, length] as generation does: keep what later tokens need, and say what comes next."""

    def generate(self, ids: Tensor, count: int) -> Generated:
        """``count`` tokens after ``ids`` [1, length], the likeliest each time."""


class Contender(Reader, Protocol):
    """One of the two models.

    Attributes:
        config: the model's, as transformers has it. generates: whether it makes one token after the other.
        prefills: whether it takes all of a prompt at once. weight_bytes: of all weights; None where nobody says.
    """

    config: Any
    dtype: str
    generates: bool
    prefills: bool
    weight_bytes: int | None

    def inputs(self, length: int) -> dict[str, Tensor]:
        """Seeded inputs: ``length`` tokens, or an image."""

    def forward(self, inputs: Mapping[str, Tensor]) -> None:
        """One pass; done when this returns."""


class InTorch:
    """A module of transformers, wherever its weights lie.

    Args:
        generation: what its ``generate`` is asked for besides.
    """

    def __init__(self, model: Any, **generation: Any) -> None:
        self.model, self.config, self.generation = model, model.config, generation
        self.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        self.generates = bool(getattr(model, "can_generate", lambda: False)())
        self.prefills = True
        self.weight_bytes: int | None = model.get_memory_footprint() if hasattr(model, "get_memory_footprint") else None

    def inputs(self, length: int) -> dict[str, Tensor]:
        return first_inputs(self.model, length)

    def forward(self, inputs: Mapping[str, Tensor]) -> None:
        self.model(**{name: value.to(self._place()) for name, value in inputs.items()})
        self._wait()

    def read_prompt(self, ids: Tensor) -> None:
        last = {"logits_to_keep": 1} if "logits_to_keep" in signature(self.model.forward).parameters else {}
        self.model(ids.to(self._place()), use_cache=True, **last)
        self._wait()

    def generate(self, ids: Tensor, count: int) -> Generated:
        ids, clock = ids.to(self._place()), Clock()
        # transformers compiles a static cache's steps and replays them as CUDA graphs, so that no launch is waited for.
        cache = {"cache_implementation": "static"} if ids.is_cuda else {}
        out: Tensor = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
            pad_token_id=0,
            streamer=clock,
            **(cache | self.generation),
        )
        return clock.of(out[0, -count:].cpu())

    def _place(self) -> torch.device:
        return next(self.model.parameters()).device

    def _wait(self) -> None:
        """Until a GPU has done what it was given."""
        if self._place().type == "cuda":
            torch.cuda.synchronize(self._place())


class InOnnx:
    """An exported graph in a session with as many threads as torch takes; on a CPU."""

    def __init__(self, place: Path, *, check: bool = True) -> None:
        self.file = find_onnx(place)
        check_written(self.file, check)
        self.config = config_beside(self.file)
        self.session = open_session(self.file, threads=torch.get_num_threads())
        self._runner: Runner | None = None
        # What generates nothing is run as it is.
        with contextlib.suppress(BackendError):
            self._runner = Runner(self.file, session=self.session, check=False)
        self.generates = self._runner is not None
        self.prefills = self._runner is None or not self._runner.step_only
        self.weight_bytes: int | None = None
        kind = self.session.get_outputs()[0].type.removeprefix("tensor(").removesuffix(")")
        self.dtype = {"float": "float32", "double": "float64"}.get(kind, kind)

    def inputs(self, length: int) -> dict[str, Tensor]:
        return first_inputs(SimpleNamespace(config=self.config, dtype=torch.float32), length)

    def forward(self, inputs: Mapping[str, Tensor]) -> None:
        if self._runner is not None:
            ids = inputs["input_ids"].numpy()
            self._runner.forward(ids, np.ones_like(ids), self._runner.empty(len(ids)))
            return
        masked = {"attention_mask": torch.ones_like(inputs["input_ids"])} if "input_ids" in inputs else {}
        try:
            self.session.run(None, feed_of(self.session, {**masked, **inputs}))
        except Exception as error:  # onnxruntime's own kinds are not importable by name
            raise BackendError(
                f"running {self.file} on {', '.join(f'{n} {list(v.shape)}' for n, v in inputs.items())}",
                found=first_line(error),
                do="A graph that was exported for one length takes --prompt of that length",
            ) from error

    def read_prompt(self, ids: Tensor) -> None:
        self.forward({"input_ids": ids})

    def generate(self, ids: Tensor, count: int) -> Generated:
        assert self._runner is not None, "asked of graphs that generate alone"
        made, clock = [], Clock()
        for token in self._runner.generate(ids.numpy(), tokens=count):
            made.append(int(token[0]))
            clock.tick()
        return clock.of(torch.tensor(made))


class Clock:
    """When each token was there; a streamer of transformers."""

    def __init__(self) -> None:
        self._times = list[tuple[float, float]]()

    def tick(self) -> None:
        self._times.append((time.perf_counter(), time.process_time()))

    def put(self, tokens: Tensor) -> None:
        """Called with tokens on the CPU: what a GPU was given is done."""
        self.tick()

    def end(self) -> None:
        pass

    def of(self, tokens: Tensor) -> Generated:
        """From the first of ``tokens``, the last that there were, to the last of them."""
        (wall, cpu), last = self._times[-len(tokens)], self._times[-1]
        return Generated(tokens, last[0] - wall, last[1] - cpu)
