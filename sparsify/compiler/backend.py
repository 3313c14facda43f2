"""What a backend is: it opens a place for the output before any work, and finishes it after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from sparsify.errors import SpecError
from sparsify.frontend.source import Source
from sparsify.ir.program import Program
from sparsify.ir.weights import Weights
from sparsify.method.base import Pass
from sparsify.method.spec import parse_backend


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


@runtime_checkable
class Settling(Protocol):
    """A job that changes weights itself, as one that rounds them."""

    def settle(self, program: Program) -> None:
        """Change them, after all passes and before the result is judged; where it was not called, ``finish`` does."""
        ...


def settle(job: Job | None, program: Program) -> None:
    """Let ``job`` change the weights that it changes; most change none."""
    if isinstance(job, Settling):
        job.settle(program)


@runtime_checkable
class Particular(Protocol):
    """A backend that cannot write what some passes leave."""

    def check(self, passes: Sequence[Pass]) -> None:
        """Refuse them, before a model is opened.

        Raises:
            SpecError: what a pass leaves is not what an option of the backend stores.
        """
        ...


@runtime_checkable
class Backend(Protocol):
    """Turns a finished program into files: a frozen dataclass whose fields are its options.

    ``needs_pass``: whether it has nothing to write where nothing was pruned. All backends so far write the parameters
    of a model, so that a pass that changes the graph itself has no output.
    """

    name: ClassVar[str]
    needs_pass: ClassVar[bool]

    def open(self, source: Source, out: Path, *, overwrite: bool, program: Program) -> Job: ...


def check_passes(backend: Backend, passes: Sequence[Pass]) -> None:
    """Let ``backend`` refuse what it cannot write; most can write whatever passes leave.

    Raises:
        SpecError: as :class:`Particular`.
    """
    if isinstance(backend, Particular):
        backend.check(passes)


def as_backend(given: str | Backend) -> Backend:
    """The backend that a spec spells, or the one given.

    Raises:
        SpecError: no such backend or option, or what is registered under that name is none.
    """
    backend = parse_backend(given) if isinstance(given, str) else given
    if not isinstance(backend, Backend):
        raise SpecError(f"backend '{given}'", found=f"{backend!r}, which is none", do="See sparsify.compiler.backend")
    return backend
