"""What ``generate`` tells token by token: text, where it ends, and that nobody listens any more."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers.cli.serving.utils import response_events_to_chunks


class Ended(Exception):
    """Raised through ``generate``: what comes after is not wanted."""


class Gone(Exception):
    """Raised through ``generate``: nobody listens any more."""


class Stops:
    """Text up to the first of some texts that end it; what may be the beginning of one waits."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts
        self.found = False
        self._held = ""

    def take(self, text: str) -> str:
        """What of ``text``, and of what waited, can be said now."""
        if self.found:
            return ""
        text = self._held + text
        places = [place for place in map(text.find, self.texts) if place >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        waits = max((_beginning(text, stop) for stop in self.texts), default=0)
        self._held = text[len(text) - waits :]
        return text[: len(text) - waits]

    def rest(self) -> str:
        """What waited for a stop that did not come."""
        held, self._held = self._held, ""
        return held

    def cut(self, text: str) -> str:
        """The whole of a text up to its first stop."""
        return text[: min((place for place in map(text.find, self.texts) if place >= 0), default=len(text))]


def _beginning(text: str, stop: str) -> int:
    """How many of the last characters of ``text`` ``stop`` begins with, short of all of it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class Listener:
    """A streamer for ``generate``, and what transformers' handlers ask of theirs (``total_tokens``, ``cancel``).

    Args:
        tokenizer: of the library tokenizers. say: told every piece of text, and None at the end.
        parser: finds calls of tools and reasoning in text; they are said as transformers' own kinds.
    """

    def __init__(
        self, tokenizer: Any, stops: Sequence[str], say: Callable[[Any], None], parser: Any | None = None
    ) -> None:
        self.ids = list[int]()
        self._tokenizer, self._say, self._parser = tokenizer, say, parser
        self._decoder = DecodeStream([], skip_special_tokens=parser is None)
        self._decoded = ""
        self._stops = Stops(stops)
        self._prompt = True
        self._gone = threading.Event()
        if parser is not None:
            self._hear(parser.initial_events)

    @property
    def total_tokens(self) -> int:
        return len(self.ids)

    def cancel(self) -> None:
        """The next token is the last."""
        self._gone.set()

    def put(self, tokens: Tensor) -> None:
        if self._gone.is_set():
            raise Gone
        if self._prompt:  # which comes first
            self._prompt = False
            return
        for token in tokens.tolist():
            self.ids.append(token)
            text = self._decoder.step(self._tokenizer, token)
            if text:
                self._decoded += text
                self._hear(text if self._parser is None else self._parser.feed(text))
            if self._stops.found:
                raise Ended

    def end(self) -> None:
        """Say what waited, and that this was all."""
        if self._parser is None:
            # Bytes that are no whole character yet.
            whole = self._tokenizer.decode(self.ids, skip_special_tokens=True)
            self._hear(whole.removeprefix(self._decoded) if whole.startswith(self._decoded) else "")
        else:
            # Where the last token was within a call it is none.
            with contextlib.suppress(ValueError, RuntimeError):
                self._hear(self._parser.finalize()[1])
        if rest := self._stops.rest():
            self._say(rest)
        self._say(None)

    def _hear(self, heard: Any) -> None:
        for item in [heard] if isinstance(heard, str) else response_events_to_chunks(heard):
            # Reasoning is a kind of str, and no stop ends it.
            item = self._stops.take(item) if type(item) is str else item
            if item:
                self._say(item)
