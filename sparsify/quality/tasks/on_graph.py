"""A graph that another runtime runs (ONNX) as lm-eval asks it, one question at a time. Imports lm-eval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from sparsify.context import Progress, report
from sparsify.errors import BackendError
from sparsify.quality.graphs import Graph
from sparsify.quality.tasks.dealing import dealt
from sparsify.world.world import ALONE, World


class GraphModel(TemplateLM):  # type: ignore[misc, unused-ignore]
    """``graph`` answers by its logits; it writes no texts.

    Args:
        max_length: tokens that it was made for. world: processes that share the questions; each is given all answers.
    """

    # Text becomes tokens just as for a model of torch: the same questions give the same ids.
    tok_encode = HFLM.tok_encode
    eot_token_id = HFLM.eot_token_id
    prefix_token_id = HFLM.prefix_token_id
    tokenizer_name = HFLM.tokenizer_name
    apply_chat_template = HFLM.apply_chat_template

    def __init__(self, graph: Graph, tokenizer: Any, *, max_length: int, world: World = ALONE) -> None:
        super().__init__()
        self.graph, self.tokenizer, self.max_length = graph, tokenizer, max_length
        # What HFLM's ways of encoding ask for: nothing was asked of us.
        self.add_bos_token, self.custom_prefix_token_id = None, None
        self.chat_template_args: dict[str, Any] = {}
        self.cut, self._world = 0, world
        self._last: tuple[tuple[int, ...], Tensor] | None = None

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """As lm-eval's, without its bar."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, **_: Any) -> list[tuple[float, bool]]:
        self.cut += sum(len(context) + len(text) > self.max_length + 1 for _, context, text in requests)
        if not self._world.divided:
            return self._answers(requests)
        # Neighbours read the same text: each process has some that follow each other.
        shares = [range(*self._world.bounds(len(requests), rank)) for rank in range(self._world.size)]
        return [(value, greedy) for value, greedy in dealt(self._world, shares, requests, self._answers)]

    def _answers(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        answers = []
        for number, (_, context, continuation) in enumerate(requests):
            report(Progress("answering", number, len(requests)))
            given = torch.tensor((context + continuation)[-(self.max_length + 1) :][:-1])
            logits = self._logits(given)[-len(continuation) :].log_softmax(-1)
            # Of a continuation that is longer than the model's context only the end is seen.
            wanted = torch.tensor(continuation)[-len(logits) :]
            likelihood = float(logits.gather(1, wanted[:, None]).sum())
            answers.append((likelihood, bool((logits.argmax(-1) == wanted).all())))
        report(Progress("answering", len(requests), len(requests)))
        return answers

    def _logits(self, ids: Tensor) -> Tensor:
        """[tokens, vocabulary] in float32; of answers of one token each all of a question read the same text."""
        key = tuple(ids.tolist())
        if self._last is None or self._last[0] != key:
            self._last = key, self.graph.logits({"input_ids": ids[None]})[0]
        return self._last[1]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Of whole texts, in windows of ``max_length`` tokens, each token predicted once."""
        answers = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            rolled = utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            windows = [(None, *window) for window in map(utils.make_disjoint_window, rolled)]
            answers.append(sum(likelihood for likelihood, _ in self._loglikelihood_tokens(windows)))
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Raises:
        BackendError: always.
        """
        raise BackendError(
            f"writing text with {self.graph.name}",
            found="an ONNX graph, of which likelihoods alone are taken",
            do="Take tasks of multiple choice, or evaluate the folder that it was made of",
        )
