"""The terminal as a place that only we format: text from files and users stands there as it is.

Names of files and tensors, values of configs and what a model writes may come from anywhere. None of it is read as
rich's markup, and none of its control characters reach the terminal: they are shown escaped.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from sparsify.words import plain


class Terminal(Console):
    """rich's console without markup, emoji codes and other people's control characters."""

    def __init__(self, *, stderr: bool = False, quiet: bool = False, soft_wrap: bool = False) -> None:
        super().__init__(stderr=stderr, quiet=quiet, soft_wrap=soft_wrap, markup=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            # Control segments are rich's own: where a progress line goes.
            yield Segment(text if control else plain(text, keep="\n"), style, control)


def say(text: str, *, lines: bool = False, end: str = "\n", flush: bool = False) -> None:
    """Print ``text`` to the standard output, control characters escaped; with ``lines`` not its own lines and tabs."""
    print(plain(text, keep="\n\t" if lines else ""), end=end, flush=flush)


def complain(message: str) -> None:
    """Print an error on one line of the standard error."""
    said = Text.assemble(("error", "bold red"), f": {plain(message)}")
    Terminal(stderr=True, soft_wrap=True).print(said, highlight=False)


def replace_what_cannot_be_written() -> None:
    """Let the standard streams of this process escape what their encoding has not, instead of failing on it."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Any = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
