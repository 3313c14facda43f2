"""Passes over a captured program as a whole, where a weight pass sees one matrix after the other.

A package of its own registers one like any pass (``sparsify.passes`` entry point); see docs/architecture.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from sparsify.context import Context
from sparsify.ir.program import Program
from sparsify.method.base import Change, Kind, Pass


@dataclass(frozen=True)
class GraphPass(Pass):
    """Base of passes that read the graph and its facts, and write weights.

    A subclass that edits the graph says so (``changes``); it is checked either way.
    """

    kind: ClassVar[Kind] = "graph"
    follows: ClassVar[frozenset[Kind]] = frozenset({"structure", "graph", "channels", "weights", "regions"})
    misplaced: ClassVar[str] = "a graph whose weights are rounded or packed by then"
    changes: ClassVar[frozenset[Change]] = frozenset({"weights"})

    def apply(self, program: Program, batches: Sequence[Mapping[str, Tensor]] | None, context: Context) -> None:
        """Do it, in place: ``program.weights.write(...)``, nodes of ``program.graph``.

        Args:
            batches: calibration batches where :attr:`needs_data`, or where the user gave some.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class LoweringPass(Pass):
    """Base of passes that rewrite a runnable graph for other operators; what they give is a module, and the last."""

    kind: ClassVar[Kind] = "lowering"
    follows: ClassVar[frozenset[Kind]] = frozenset({"structure", "graph", "channels", "weights", "regions", "rounding"})
    misplaced: ClassVar[str] = "a graph that is lowered already"
    changes: ClassVar[frozenset[Change]] = frozenset({"graph"})

    def lower(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        """The lowered graph; the one given is not changed."""
        raise NotImplementedError
