"""The one place through which every pass runs: time, progress, verification, and who looks on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from sparsify.context import Context, Progress
from sparsify.errors import SparsifyError, VerifyError, first_line
from sparsify.host import is_out_of_memory, within_memory
from sparsify.ir.program import Program
from sparsify.method.base import Pass
from sparsify.method.spec import spec_text
from sparsify.tensors import all_finite

# Told of every pass that has run, with the program as it is then.
After = Callable[[Pass, Program], None]


def nobody(own: Pass, program: Program) -> None:
    """Looks on and does nothing."""


@dataclass
class Ran:
    """A pass that is running: whoever runs it sets ``program`` where it becomes another one.

    Attributes:
        seconds, written: once it has run, how long it took and which parameters it wrote.
    """

    program: Program
    seconds: float = 0.0
    written: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Seam:
    """Runs passes one after the other.

    Attributes:
        after: called after each with the pass and the program.
    """

    context: Context
    after: After = nobody

    @contextmanager
    def running(self, own: Pass, program: Program) -> Iterator[Ran]:
        """Around what ``own`` does to ``program``.

        Raises:
            VerifyError: the program breaks a rule afterwards, or the pass changed what it declares not to change.
            CalibrationError: too little memory.
        """
        ran, started = Ran(program), time.perf_counter()
        if own.kind in ("graph", "lowering"):
            # The others tell, region by region.
            self.context.observe(Progress(f"running {own.name}", what=spec_text(own)))
        before = _snapshot(program)
        program.weights.written.clear()
        with within_memory(f"pass {own.name}", self.context.device), _named(own):
            yield ran
            ran.seconds, ran.written = time.perf_counter() - started, set(ran.program.weights.written)
            if ran.program is program:
                self._check_declared(own, ran, before)
            if own.kind == "graph":
                _check_written(ran)
            ran.program.verify()
        self.after(own, ran.program)

    def _check_declared(self, own: Pass, ran: Ran, before: list[Any]) -> None:
        changed = _snapshot(ran.program) != before
        if changed:
            ran.program.changed()
        found = None
        if changed and "graph" not in own.changes:
            found = "the graph"
        elif "weights" not in own.changes and ran.written:
            found = f"the weight {sorted(ran.written)[0]}"
        if found is not None:
            raise VerifyError(
                f"pass {own.name}",
                found=f"it changed {found}, and declares that it changes {', '.join(sorted(own.changes)) or 'nothing'}",
                do="Report this as a bug in the pass; its author sets `changes`",
            )


@contextmanager
def _named(own: Pass) -> Iterator[None]:
    """Errors of a pass that sees the graph as a whole say which pass it was; the engine's name the site."""
    try:
        yield
    except SparsifyError as error:
        if own.kind != "graph" or own.name in error.asked:
            raise
        raise error.asking(f"pass {own.name}: {error.asked}") from error
    except Exception as error:
        if own.kind not in ("graph", "lowering") or is_out_of_memory(error):
            raise
        raise VerifyError(
            f"pass {own.name}",
            found=f"it raised {type(error).__name__}: {first_line(error)}",
            do="Report this to its author; --debug shows where",
        ) from error


def _check_written(ran: Ran) -> None:
    """What a graph pass wrote: the engine checks each weight of a weight pass itself.

    Raises:
        VerifyError: a weight that is NaN or infinite, or of another dtype or shape.
    """
    said = ran.program.parameter_nodes()
    for name in sorted(ran.written):
        value = ran.program.weights.read(name)
        expected = tuple(said[name].meta["val"].shape) if name in said else tuple(value.shape)
        found = None
        if tuple(value.shape) != expected:
            found = f"shape {list(value.shape)} for {list(expected)}"
        elif value.is_floating_point() and not all_finite(value):
            found = "a weight that is NaN or infinite"
        if found is not None:
            raise VerifyError(f"weight {name}", found=found, do="Report this as a bug in the pass")


def _snapshot(program: Program) -> list[tuple[fx.Node, Any, Any, Any]]:
    return [(node, node.target, node.args, node.kwargs) for node in program.graph.nodes]
