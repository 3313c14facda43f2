"""Graphs of other compilers, before and after LowerSparse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from sparsify.ir.operators import operator_name
from sparsify.runtime.cpu.stopwatch import Stopwatch

GRAPHS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "symbolic_trace": lambda net, x: fx.symbolic_trace(net),
    "export": lambda net, x: torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},)),
    "module": lambda net, x: torch.export.export(net, (x,)).module(),
    "decomposed": lambda net, x: torch.export.export(net, (x,)).run_decompositions(),
}


def ops_of(graph: fx.GraphModule) -> Counter[str]:
    calls = [n for n in graph.graph.nodes if n.op in ("call_function", "call_method", "call_module")]
    return Counter(operator_name(n) for n in calls)


def times(
    monkeypatch: pytest.MonkeyPatch,
    *,
    torch_: float = 3.0,
    dense: float = 3.0,
    packed: float = 1.0,
    merged: float = 1.0,
) -> None:
    """What the stopwatch shall say: of two calls the second is the merged one, of three the third the packed."""

    def race(self: Stopwatch, calls: list[Callable[[], object]]) -> list[float]:
        shapes = [call() for call in calls]
        if len(calls) == 3:
            return [torch_, dense, packed]
        return [packed, merged] if isinstance(shapes[0], list) else [torch_, dense]

    monkeypatch.setattr(Stopwatch, "race", race)
