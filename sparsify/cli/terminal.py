"""The terminal as a place that only we format: text from files and users stands there as it is.

Names of files and tensors, values of configs and what a model writes may come from anywhere. None of it is read as
rich's markup, and none of its control characters reach the terminal: they are shown escaped.
"""

from __future__ import annotations

import io
import os
import stat
import sys
from typing import Any

from sparsify.words import plain


def say(text: str, *, lines: bool = False, end: str = "\n", flush: bool = False) -> None:
    """Print ``text`` to the standard output, control characters escaped; with ``lines`` not its own lines and tabs."""
    print(plain(text, keep="\n\t" if lines else ""), end=end, flush=flush)


def complain(message: str) -> None:
    """Print an error on one line of the standard error."""
    # rich costs a tenth of what help may take, and help has no error to tell.
    from rich.text import Text

    from sparsify.cli.console import Terminal

    said = Text.assemble(("error", "bold red"), f": {plain(message)}")
    Terminal(stderr=True, soft_wrap=True).print(said, highlight=False)


class _Patient(io.FileIO):
    """A stream of this process whose reader may leave: what is written then is nobody's, and no failure of a command
    whose work is files."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except BrokenPipeError:
            return len(data)


def patient_streams() -> None:
    """Let the standard streams of this process escape what their encoding has not, and outlive their readers
    (``sparsify compile … | head -3``)."""
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        reconfigure: Any = getattr(stream, "reconfigure", None)
        if reconfigure is None:
            continue
        reconfigure(errors="backslashreplace")
        try:
            number = stream.fileno()
            pipe = stat.S_ISFIFO(os.fstat(number).st_mode) or stat.S_ISSOCK(os.fstat(number).st_mode)
        except (OSError, ValueError):
            continue
        if pipe:
            stream.flush()
            raw = io.BufferedWriter(_Patient(number, "w", closefd=False))
            lines = name == "stderr"
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, "backslashreplace", line_buffering=lines))
