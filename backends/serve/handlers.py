"""transformers' handlers of ``/v1/completions`` and ``/v1/chat/completions`` for one model that is held already."""

from __future__ import annotations

import copy
import inspect
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.utils import Modality

from sparsify.backends.serve.listener import Stops
from sparsify.backends.serve.refusal import Refusal
from sparsify.backends.serve.turn import Turn
from sparsify.backends.serve.words import is_sampled

# Of answers whose length the request leaves open, as transformers has it; the model's own config may say more.
_TOKENS = 1024


@dataclass(frozen=True)
class Held:
    """A model in memory, and what requests call it.

    Attributes:
        context: as many tokens as it can hold; None where nobody says. vocabulary: how many tokens it knows.
        worker: the one thread on which it runs.
    """

    name: str
    model: Any
    tokenizer: Any
    context: int | None
    vocabulary: int
    worker: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "sparsify-serve"))

    def turn(self, body: dict[str, Any]) -> Turn:
        exact = body.get("max_completion_tokens") or body.get("max_tokens")
        return Turn(self.worker, context=self.context, exact=exact, seed=body.get("seed"), stops=stops_of(body))

    def check(self, body: dict[str, Any], *, chat: bool) -> None:
        """What a request must not ask of this model in particular.

        Raises:
            Refusal: it is asked.
        """
        if chat and self.tokenizer.chat_template is None:
            raise Refusal(
                f"{self.name!r} has no chat template, which would make text of messages. Send text as prompt to "
                "/v1/completions",
                param="messages",
            )
        if unknown := [token for token in body.get("logit_bias") or {} if int(token) >= self.vocabulary]:
            raise Refusal(f"logit_bias has token {unknown[0]}; there are {self.vocabulary}", param="logit_bias")
        own = inspect.signature(self.tokenizer.apply_chat_template).parameters
        if taken := sorted(own.keys() & (body.get("chat_template_kwargs") or {}).keys()):
            raise Refusal(f"chat_template_kwargs has {taken[0]!r}, which is no variable of a template")

    # What handlers ask of transformers' ModelManager.
    force_model = None

    def get_model_modality(self, model: Any, processor: Any = None) -> Modality:
        return Modality.LLM


class _One:
    """What handlers ask of transformers' GenerationState, for one request."""

    def __init__(self, turn: Turn) -> None:
        self.turn = turn

    def use_continuous_batching(self, model: Any, modality: Any) -> bool:
        # Its settings of sampling are shared by all requests.
        return False

    def get_manager(self, model_id: str, use_cb: bool = False) -> Turn:
        return self.turn


class _Handler:
    """Bodies have been checked: no field is passed over, and no request loads a model."""

    def __init__(self, held: Held, body: dict[str, Any]) -> None:
        self.turn = held.turn(body)
        super().__init__(held, _One(self.turn))  # type: ignore[call-arg]
        self.held = held

    def _validate_request(self, body: dict[str, Any]) -> None:
        pass

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        return self.held.name, self.held.model, self.held.tokenizer

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: GenerationConfig, use_cb: bool = False
    ) -> GenerationConfig:
        return generation_config(body, model_generation_config, self.held.tokenizer)


class Completions(_Handler, CompletionHandler):
    pass


class Chat(_Handler, ChatCompletionHandler):
    def _build_completion(self, request_id: str, content: str, *args: Any, **named: Any) -> dict[str, Any]:
        # Where a model's answers are parsed, the content is made of tokens again.
        stops = Stops(self.turn.stops)
        return super()._build_completion(request_id, stops.cut(content), *args, **named)


def stops_of(body: dict[str, Any]) -> list[str]:
    stop = body.get("stop") or []
    return [stop] if isinstance(stop, str) else stop


def generation_config(body: dict[str, Any], own: GenerationConfig, tokenizer: Any) -> GenerationConfig:
    """The model's own config with what a request says.

    transformers' own leaves sampling off where a model's config does, whatever temperature is asked for, and makes a
    factor of frequency_penalty, which is a difference.
    """
    made = copy.deepcopy(own)
    # One answer, token by token.
    made.num_beams = made.num_return_sequences = 1
    asked = body.get("max_completion_tokens") or body.get("max_tokens")
    made.max_new_tokens = asked or max(made.max_new_tokens or 0, _TOKENS)
    made.max_length = None
    sampled = is_sampled(body)
    if sampled is not None:
        made.do_sample = sampled
    if sampled and body.get("temperature") is not None:
        made.temperature = float(body["temperature"])
    if sampled and body.get("top_p") is not None:
        made.top_p = float(body["top_p"])
    if body.get("logit_bias"):
        made.sequence_bias = {(int(token),): float(bias) for token, bias in body["logit_bias"].items()}
    # Text is decoded without special tokens: one that is to end it is looked for among the tokens.
    special = [token for text in stops_of(body) if (token := _special(tokenizer, text)) is not None]
    if special:
        ends = made.eos_token_id
        made.eos_token_id = [*(ends if isinstance(ends, list) else [] if ends is None else [ends]), *special]
    return made


def _special(tokenizer: Any, text: str) -> int | None:
    return tokenizer.convert_tokens_to_ids(text) if text in tokenizer.all_special_tokens else None
