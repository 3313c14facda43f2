"""A model of torch as lm-eval asks it: its own ``HFLM`` with the model in memory. Imports lm-eval."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from sparsify.context import Progress, report
from sparsify.quality.tasks.dealing import batches_of_likelihoods, batches_of_texts, dealt
from sparsify.world.world import ALONE, World


class TorchModel(HFLM):  # type: ignore[misc, unused-ignore]
    """``module`` answers, and progress is told of in phases of ours.

    Args:
        module: nobody else's. tokenizer: stays as it is. batch_size: questions at a time. world: processes that share
            the questions; each is given all answers.
    """

    def __init__(self, module: Any, tokenizer: Any, *, batch_size: int, world: World = ALONE) -> None:
        # lm-eval would tie once more what the config says is tied, and a file may hold two that differ.
        module.tie_weights = lambda *_, **__: None
        # lm-eval gives a tokenizer without padding one. Likelihoods are summed in float32, whatever the model is in.
        super().__init__(module, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, softmax_dtype=torch.float32)
        self._phase, self._done = "answering", 0
        # Answers whose text was longer than the model's context: its beginning was cut off.
        self.cut = 0
        self._asked: int | None = None
        self._shared = world
        # Of windows of long texts: what each batch of them is answered; None by another process, which answers it.
        self._own: list[list[Any] | None] | None = None
        self._known: Iterator[list[Any]] | None = None

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """As lm-eval's, told of."""
        self._begin("answering", len(requests))
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        self._end()
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """As lm-eval's, told of."""
        self._begin("reading texts", None)
        if self._shared.divided:
            # Twice over: each asks the model of its batches first, and then adds up what all found.
            self._own = []
            super().loglikelihood_rolling(requests, disable_tqdm=True)
            said = self._shared.told(self._own)
            self._own = None
            self._known = iter([next(one for one in of if one is not None) for of in zip(*said, strict=True)])
        answers: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        self._known = None
        self._end()
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """As lm-eval's, told of."""
        self._begin("writing answers", len(requests))
        if self._shared.divided:
            given = [request.args for request in requests]
            batches = batches_of_texts(given, self._size, lambda text: len(self.tok_encode(text)))
            answers = dealt(self._shared, batches, requests, self._written)
        else:
            answers = self._written(requests)
        self._end()
        return answers

    def _written(self, requests: list[Any]) -> list[str]:
        answers: list[str] = super().generate_until(requests, disable_tqdm=True)
        return answers

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, **more: Any) -> Any:
        if self._known is not None:
            return next(self._known)
        if self.backend == "causal":
            self.cut += sum(len(context) + len(text) > self.max_length + 1 for _, context, text in requests)

        def ask(some: Any) -> Any:
            return super(TorchModel, self)._loglikelihood_tokens(some, disable_tqdm=True, **more)

        if not self._shared.divided:
            return ask(requests)
        if self._own is not None:
            mine = len(self._own) % self._shared.size == self._shared.rank
            self._own.append(ask(requests) if mine else None)
            return self._own[-1] or [(0.0, False)] * len(requests)
        grouped = bool(self.backend == "causal" and self.logits_cache)
        batches = batches_of_likelihoods(requests, self._size, grouped=grouped)
        return [(value, greedy) for value, greedy in dealt(self._shared, batches, requests, ask)]

    @property
    def _size(self) -> int:
        """Questions at a time: nothing else was asked for."""
        return int(self.batch_size)

    def _model_call(self, inps: Tensor, *more: Any, **named: Any) -> Tensor:
        logits: Tensor = super()._model_call(inps, *more, **named)
        self._tell(len(inps))
        return logits

    def _model_generate(self, context: Tensor, *more: Any, **named: Any) -> Tensor:
        written: Tensor = super()._model_generate(context, *more, **named)
        self._tell(len(context))
        return written

    def _begin(self, phase: str, asked: int | None) -> None:
        self._phase, self._done, self._asked = phase, 0, asked
        report(Progress(phase, 0, asked))

    def _tell(self, rows: int) -> None:
        # Questions whose text was seen already cost no forward: the end may come sooner.
        self._done += rows
        report(Progress(self._phase, self._done, self._asked))

    def _end(self) -> None:
        total = self._done if self._asked is None else self._asked
        report(Progress(self._phase, total, total))
