"""What a backend is: it opens a place for the output before any work, and finishes it after."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Protocol

from sparsify.program import Program
from sparsify.source import Source
from sparsify.weights import Weights


class Job(Protocol):
    """An output under construction. Leaving the context without :meth:`finish` leaves nothing behind.

    Attributes:
        weights: the parameters of the model over the output's own storage: passes read and write these.
    """

    weights: Weights

    def finish(self, program: Program, manifest: dict[str, Any]) -> tuple[Path, Weights]:
        """Put the output in place; where it lies, and the parameters as it holds them."""
        ...

    def notes(self) -> list[str]:
        """What the user should know of what was written, beside its path."""
        ...

    def __enter__(self) -> Job: ...

    def __exit__(self, *error: Any) -> None: ...


class Backend(Protocol):
    """Turns a finished program into files: a frozen dataclass whose fields are its options.

    ``needs_pass``: whether it has nothing to write where nothing was pruned.
    """

    name: ClassVar[str]
    needs_pass: ClassVar[bool]

    def open(self, source: Source, out: Path, *, overwrite: bool, program: Program) -> Job: ...
