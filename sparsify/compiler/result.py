"""What a compile gives back."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from sparsify.analysis.linear import Opaque
from sparsify.compiler.backend import Backend, as_backend, check_passes
from sparsify.compiler.recipe import DEFAULTS, backend_text, without_defaults
from sparsify.compiler.runs import PassRun
from sparsify.compiler.summary import Summary
from sparsify.context import Observer
from sparsify.data.batches import Calibration
from sparsify.errors import SpecError, near
from sparsify.frontend.materialize import materialize
from sparsify.frontend.source import Source
from sparsify.host import cpu_by_default
from sparsify.ir.program import Program
from sparsify.ir.store import MemoryStore
from sparsify.ir.weights import Weights
from sparsify.method.spec import spec_text
from sparsify.progress import Shown, shown
from sparsify.provenance.carried import in_another_form
from sparsify.quality.evaluation import Judged
from sparsify.structure.record import Restructured
from sparsify.words import path_given


@dataclass(repr=False)
class Compiled:
    """The result of :func:`compile`.

    Attributes:
        runs: one per pass, in order. ``calibration``: None where no data was used. ``opaque``: contractions with
            a parameter that no pass can prune. ``output``: the folder that was written, or None; ``notes``: what the
            backend says of it. ``structure``: what structural passes took out, before ``runs``; ``source`` is the
            smaller model then. ``dense``: the weights before ``runs``, in the order that passes gave to channels.
            ``lowered``: the module that a lowering pass gave. ``evaluation``: perplexity before and after, where
            ``evaluate`` was given. ``manifest``: what ``sparsify.json`` says of all this.
    """

    source: Source
    program: Program
    runs: list[PassRun]
    calibration: Calibration | None = None
    opaque: Sequence[Opaque] = ()
    structure: list[Restructured] = field(default_factory=list)
    dense: Weights | None = None
    output: Path | None = None
    notes: list[str] = field(default_factory=list)
    lowered: fx.GraphModule | None = None
    evaluation: Judged | None = None
    manifest: dict[str, Any] = field(default_factory=dict)
    # What the folder that it was made of says of its own card.
    source_card: Mapping[str, Any] | None = None
    # Whoever owns the folder of a smaller model that was not written to an output.
    folder_owner: object = field(default=None)

    def __repr__(self) -> str:
        return self._said.line()

    def _repr_html_(self) -> str:
        return self._said.html()

    def summary(self) -> str:
        """What was done, as text: per pass a table by kind of site, what stayed dense, and where it lies."""
        return self._said.text()

    @property
    def _said(self) -> Summary:
        made = [spec_text(done.structural_pass) for done in self.structure]
        where = f"written to {self.output}" if self.output is not None else "in memory"
        data = None if self.calibration is None else f"{self.calibration.size}: {self.calibration.said}"
        smaller = [line for done in self.structure for line in done.lines()]
        where = where if self.manifest else "a dry run: nothing was pruned"
        judged = [] if self.evaluation is None else self.evaluation.lines()
        return Summary(self.source.name, self.program.weights, made, smaller, self.runs, data, where, judged)

    def check_holds(self, doing: str) -> None:
        """Raises:
        SpecError: nothing has run, or a graph that passes changed, which is not the model's parameters alone.
        """
        asked = f"{doing}: {self!r}"
        if not self.manifest:
            raise SpecError(asked, found="a dry run, which pruned nothing", do="Compile without dry_run")
        if own := next((run.applied for run in self.runs if "graph" in run.applied.changes), None):
            raise SpecError(
                asked, found=f"a graph that {spec_text(own)} changed", do=f"Leave {own.name} out, or run result.model"
            )

    @cpu_by_default()
    def save(
        self,
        folder: str | Path,
        to: str | Backend = "hf",
        *,
        overwrite: bool = False,
        progress: Shown = False,
        observe: Observer | None = None,
    ) -> Path:
        """Write the result to ``folder``, which appears whole or not at all: what ``compile`` would have written there.

        Args:
            folder: where, as ``output`` of :func:`sparsify.compile`; so are all others.

        Returns:
            Where it lies.

        Raises:
            SpecError: no such backend, or nothing to write. BackendError: the folder cannot be written.
        """
        self.check_holds("saving it")
        backend, out = as_backend(to), path_given(folder, "saving a result")
        if backend.needs_pass and not self.runs and not self.structure:
            raise SpecError(f"saving {self!r} to {backend.name}", found="no pass in it", do="Give compile a pass")
        check_passes(backend, [run.applied for run in self.runs])
        program, weights = replace(self.program), self.program.weights
        with (
            shown(progress, observe),
            backend.open(self.source, out, overwrite=overwrite, program=program) as job,
        ):
            program.weights = job.weights
            # Of a parameter that is several tensors of the checkpoint only some may have been written.
            own = set(weights.store.tensors) if isinstance(weights.store, MemoryStore) else None
            for name in sorted({name for run in self.runs for name in run.written}):
                some = None if own is None or own.issuperset(weights.sources(name)) else own
                job.weights.write(name, weights.read(name), some)
            path, there = job.finish(program, self._manifest(backend))
            self.notes = job.notes()
        if self.output is not None and path == self.output.absolute():
            weights = there  # what it was read from is gone
        self.output, self.program.weights = path, weights
        return path

    def _manifest(self, backend: Backend) -> dict[str, Any]:
        """What ``sparsify.json`` says where ``backend`` writes it, whichever wrote it before."""
        said = copy.deepcopy(in_another_form(self.manifest))
        # Which card is ours: of the folder that this is made of, not of the one that was written.
        said.pop("card", None)
        said |= {} if self.source_card is None else {"card": dict(self.source_card)}
        for told in (said, said["history"][-1]):
            if "recipe" in told:
                told["recipe"] = without_defaults(told["recipe"] | {"to": backend_text(backend)}, DEFAULTS)
        return said

    def weight(self, name: str) -> Tensor:
        """A parameter as it is after the passes, by its name in the model or in the checkpoint."""
        weights = self.program.weights
        if name in weights:
            return weights.read(name)
        if name in set(weights.store.names()):
            return weights.store.read(name)
        raise SpecError(f"weight {name}", found="no such parameter", do=near(name, weights.parameters()))

    @property
    def model(self) -> nn.Module:
        """The pruned model: a copy of a module given in Python, sharing what was not pruned; else built anew.

        After a lowering pass it is the lowered graph, for inputs of the shapes that the model was traced with.
        """
        if self.lowered is not None:
            return self.lowered
        changed = {name for run in self.runs for name in run.written}
        return materialize(self.source, self.program.weights, changed)
