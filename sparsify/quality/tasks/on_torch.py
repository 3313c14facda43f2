"""A model of torch as lm-eval asks it: its own ``HFLM`` with the model in memory. Imports lm-eval."""

from __future__ import annotations

import copy
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from sparsify.context import Progress, report


class TorchModel(HFLM):  # type: ignore[misc, unused-ignore]
    """``module`` answers, and progress is told of in phases of ours.

    Args:
        module: nobody else's. tokenizer: stays as it is. batch_size: questions at a time.
    """

    def __init__(self, module: Any, tokenizer: Any, *, batch_size: int) -> None:
        # lm-eval would tie once more what the config says is tied, and a file may hold two that differ.
        module.tie_weights = lambda *_, **__: None
        # lm-eval gives a tokenizer without padding one. Likelihoods are summed in float32, whatever the model is in.
        super().__init__(module, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, softmax_dtype=torch.float32)
        self._phase, self._done = "answering", 0
        # Answers whose text was longer than the model's context: its beginning was cut off.
        self.cut = 0
        self._asked: int | None = None

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """As lm-eval's, told of."""
        self._begin("answering", len(requests))
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        self._end()
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """As lm-eval's, told of."""
        self._begin("reading texts", None)
        answers: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        self._end()
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """As lm-eval's, told of."""
        self._begin("writing answers", len(requests))
        answers: list[str] = super().generate_until(requests, disable_tqdm=True)
        self._end()
        return answers

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, **more: Any) -> Any:
        if self.backend == "causal":
            self.cut += sum(len(context) + len(text) > self.max_length + 1 for _, context, text in requests)
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, **more)

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
