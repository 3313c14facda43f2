"""A program run in a few regions, and a module that is hard to cut."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify.analysis.flow import Flow
from sparsify.calibration.activations import ActivationStore
from sparsify.calibration.interpreter import Interpreter, Region
from sparsify.ir.program import Program

CPU = torch.device("cpu")


def execute(program: Program, batches: list[dict[str, Tensor]], cuts: int = 3, budget: int = 1 << 30) -> list[Any]:
    """Run the whole graph in a few regions and return its first output for each batch."""
    flow = Flow.of(program)
    output = next(n for n in program.graph.nodes if n.op == "output")
    first: Any = output.args[0]
    while not isinstance(first, fx.Node):
        first = next(iter(first))
    results: list[Any] = [None] * len(batches)
    end = len(flow.order)
    edges = sorted({0, *(end * i // cuts for i in range(1, cuts)), end})

    def keep(index: int, node: fx.Node, values: Mapping[fx.Node, Any]) -> None:
        results[index] = values[node].clone()

    with ActivationStore(budget) as store, torch.no_grad():
        runner = Interpreter(program, flow, batches, store, CPU)
        for start, stop in pairwise(edges):
            inside = [first] if start <= flow.position[first] < stop else []
            runner.run_region(Region(start, stop, end), watch=inside, on_value=keep)
        assert not runner.resident, "every weight is freed"
    return results


class Plain(nn.Module):
    """Masks under construction, in-place arithmetic, a literal tensor, a buffer, a tie: what traces trip over."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.second.weight
        self.register_buffer("scale", torch.rand(8), persistent=False)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        mask = torch.zeros(8)
        mask[2:4] = -1.0
        y = self.first(x) * self.scale + mask + torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8])
        z = torch.zeros_like(y)
        z += y
        z[..., 0] = 5
        counter = torch.zeros(8)
        counter += z.sum(dim=0)
        with torch.autocast("cpu", enabled=False):
            z = self.second(z) + counter
        z = self.tied(torch.nn.functional.dropout(z, training=self.training))
        return z if extra is None else z + extra
