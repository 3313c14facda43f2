"""What a backend is: it opens a place for the output before any work, and finishes it after."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from sparsify.program import Program
from sparsify.source import Source
from sparsify.weights import Weights


class Job(Protocol):
    """An output under construction. Leaving the context without :meth:`finish` leaves nothing behind.

    Attributes:
        weights: the parameters of the model over the output's own storage: passes read and write these.
    """

    weights: Weights

    def finish(self, program: Program, manifest: dict[str, Any]) -> Path: ...

    def __enter__(self) -> Job: ...

    def __exit__(self, *error: Any) -> None: ...


class Backend(Protocol):
    """Turns a finished program into files."""

    name: str

    def open(self, source: Source, out: Path, *, overwrite: bool) -> Job: ...
