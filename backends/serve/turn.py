"""One request's generation, on the one thread on which the model runs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.cli.serving.utils import BaseGenerateManager, _StreamError

from sparsify.backends.serve.listener import Ended, Gone, Listener, Stops
from sparsify.backends.serve.refusal import Refusal
from sparsify.errors import first_line
from sparsify.runtime.cpu.wide import wide_products

_LOG = logging.getLogger("sparsify.serve")


class Turn(BaseGenerateManager):
    """What transformers' handlers generate with. It is used once.

    transformers' own seeds the process when a request arrives, while others are being answered; ends at a stop whose
    text it leaves in the answer; and goes on for clients that have gone, where they did not ask for a stream.

    Args:
        worker: of one thread: requests are answered one after the other.
        context: as many tokens as the model can hold; None where nobody says.
        exact: the number of tokens that the request itself asks for. seed, stops: as it asks.
    """

    def __init__(
        self,
        worker: ThreadPoolExecutor,
        *,
        context: int | None,
        exact: int | None = None,
        seed: int | None = None,
        stops: Sequence[str] = (),
    ) -> None:
        self.begun = False
        self._worker, self._context, self._exact = worker, context, exact
        self._seed, self.stops = seed, stops
        self._listener: Listener | None = None
        self._cancelled = False

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: GenerationConfig,
        request_id: str,
        response_parser: Any | None = None,
    ) -> tuple[asyncio.Queue[Any], Listener]:
        """A queue of pieces of text, None at its end."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def say(item: Any) -> None:
            # The loop is closed where the server stops in the middle of a token.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(queue.put_nowait, item)

        self._fit(inputs, gen_config)
        listener = self._listen(processor, say, response_parser)

        def failed(done: Future[None]) -> None:
            if not done.cancelled() and (error := done.exception()) is not None:
                _LOG.error("a request failed while its answer was streamed: %s", first_line(error))
                # transformers writes it between quotes as it is.
                say(_StreamError(json.dumps(f"generation failed: {first_line(error)}")[1:-1]))

        self._submit(model, inputs, gen_config, listener).add_done_callback(failed)
        return queue, listener

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: GenerationConfig, request_id: str
    ) -> tuple[str, int, list[int]]:
        """Text, the number of tokens of the prompt, and the tokens after it."""
        self._fit(inputs, gen_config)
        listener = self._listen(processor, lambda item: None, None)
        await asyncio.wrap_future(self._submit(model, inputs, gen_config, listener))
        text = processor.decode(listener.ids, skip_special_tokens=True)
        return Stops(self.stops).cut(text), inputs["input_ids"].shape[-1], listener.ids

    def cancel(self) -> None:
        """Nobody waits for the answer: the next token is the last, and a turn that waits is not taken."""
        self._cancelled = True
        if self._listener is not None:
            self._listener.cancel()

    def stop(self) -> None:
        self.cancel()

    def _listen(self, processor: Any, say: Any, parser: Any | None) -> Listener:
        self._listener = Listener(processor._tokenizer, self.stops, say, parser)
        if self._cancelled:
            self._listener.cancel()
        return self._listener

    def _fit(self, inputs: Any, config: GenerationConfig) -> None:
        """Room for the answer behind the prompt.

        Raises:
            Refusal: there is none, or less than the request asks for.
        """
        length = inputs["input_ids"].shape[-1]
        if not length:
            raise Refusal("The prompt is of no tokens at all. Write some text", param="prompt")
        if self._context is None:
            return
        room = self._context - length
        if room < (self._exact or 1):
            asked = f" and {self._exact} more are asked for" if self._exact else ""
            raise Refusal(
                f"The model holds {self._context} tokens; the prompt is of {length}{asked}. Write a shorter prompt"
                + (f", or ask for at most {room}" if room > 0 else ""),
                code="context_length_exceeded",
            )
        config.max_new_tokens = min(config.max_new_tokens, room)

    def _submit(self, model: Any, inputs: Any, config: GenerationConfig, listener: Listener) -> Future[None]:
        # Some tokenizers add what no causal model takes.
        given = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}

        def run() -> None:
            # Drawn anew without a seed, so that no request depends on the seed of another.
            torch.manual_seed(self._seed) if self._seed is not None else torch.seed()
            try:
                with wide_products():
                    model.generate(**given, generation_config=config, streamer=listener)
            except Ended:
                listener.end()
            except Gone:
                pass

        self.begun = True
        return self._worker.submit(run)
