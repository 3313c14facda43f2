"""A backend whose manifest has the search that its folder comes of, and whose folder appears only if it is as good."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsify.compiler.backend import Backend, Job, check_passes, settle
from sparsify.frontend.source import Source
from sparsify.ir.program import Program
from sparsify.ir.weights import Weights
from sparsify.method.base import Pass


@dataclass(frozen=True)
class Recorded:
    """``inner`` with a look at the weights before its folder appears.

    Attributes:
        look: given the pruned weights; gives what ``sparsify.json`` says of the search, or raises.
        recipe: of the compile, whose data are in memory here and were named; None where they were not.
    """

    inner: Backend
    look: Callable[[Weights], dict[str, Any]]
    recipe: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def needs_pass(self) -> bool:
        return self.inner.needs_pass

    def check(self, passes: Sequence[Pass]) -> None:
        """See :class:`~sparsify.compiler.backend.Particular`."""
        check_passes(self.inner, passes)

    def open(self, source: Source, out: Path, *, overwrite: bool, program: Program) -> Job:
        """See :class:`~sparsify.compiler.backend.Backend`."""
        return _Job(self.inner.open(source, out, overwrite=overwrite, program=program), self.look, self.recipe)


class _Job:
    def __init__(self, inner: Job, look: Callable[[Weights], dict[str, Any]], recipe: Mapping[str, Any] | None) -> None:
        self.inner, self.look, self.recipe = inner, look, recipe
        self.weights: Weights = inner.weights

    def settle(self, program: Program) -> None:
        """See :class:`~sparsify.compiler.backend.Settling`."""
        settle(self.inner, program)

    def finish(self, program: Program, manifest: dict[str, Any]) -> tuple[Path, Weights]:
        manifest["search"] = self.look(program.weights)
        if self.recipe is not None:
            for told in (manifest, manifest["history"][-1]):
                told["recipe"] = dict(self.recipe)
        return self.inner.finish(program, manifest)

    def notes(self) -> list[str]:
        return self.inner.notes()

    def __enter__(self) -> Job:
        self.inner.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.inner.__exit__(*error)
