"""What tests of coupled dimensions share: a program run plainly, and the one property that proves a group right."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from support.folders import load
from torch import Tensor, fx, nn

from sparsify.analysis.dimensions.groups import Dimensions, coupled_dimensions
from sparsify.frontend.capture import capture
from sparsify.frontend.source import open_source
from sparsify.inspection.dimensions import DimensionReport
from sparsify.ir.program import Program
from sparsify.ir.store import MemoryStore
from sparsify.ir.weights import Weights
from sparsify.structure.shrink import shrink

# A family's graph and its coupled dimensions: what the fixture ``report`` gives.
Reports = Callable[[str], tuple[Program, DimensionReport]]


def run(program: Program, batch: Mapping[str, Tensor], weights: Weights | None = None) -> Tensor:
    """The first output, node by node."""
    held, env = weights or program.weights, dict[fx.Node, Any]()
    with torch.no_grad():
        for node in program.graph.nodes:
            if node.op == "placeholder":
                env[node] = batch[node.meta["input"]]
            elif node.op == "get_attr":
                name = str(node.target)
                constant = program.constants.get(name)
                env[node] = held.read(name).to(node.meta["val"].dtype) if constant is None else constant
            elif node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
                env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            else:
                found: Any = fx.node.map_arg(node.args[0], lambda n: env[n])
                return found[0]
    raise AssertionError("a graph without an output")


def zeroed(program: Program, dimensions: Dimensions, remove: Mapping[int, Sequence[int]]) -> Weights:
    """The dense weights with everything that ``remove`` names at zero."""
    weights = program.weights.on(MemoryStore(program.weights.store))
    for number, channels in remove.items():
        for member in dimensions.groups[number].members:
            value = weights.read(member.parameter).clone()
            value.index_fill_(member.axis, torch.from_numpy(member.positions(channels)), 0)
            weights.write(member.parameter, value)
    return weights


def check_equality(
    program: Program, dimensions: Dimensions, remove: Mapping[int, Sequence[int]], batch: Mapping[str, Tensor]
) -> Program:
    """The shrunken program gives what the dense one gives with those channels at zero."""
    small = shrink(program, dimensions, remove)
    exact = run(program, batch, zeroed(program, dimensions, remove))
    got = run(small, batch)
    assert got.shape == exact.shape
    assert float((got - exact).norm()) <= 1e-5 * float(exact.norm()) + 1e-12
    for name, node in ((str(n.target), n) for n in small.graph.nodes if n.op == "get_attr"):
        if name not in small.constants:
            assert small.weights.read(name).shape == node.meta["val"].shape, name
    return small


def zeroed_model(dense: Path, structure: Any) -> Any:
    """The dense model with everything at zero that was taken out."""
    model = load(dense)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for cut in structure.cuts:
            for name, axis, kept in cut.members:
                gone = torch.ones(parameters[name].shape[axis], dtype=torch.bool)
                gone[list(kept)] = False
                parameters[name].index_fill_(axis, gone.nonzero()[:, 0], 0)
    return model


class Net(nn.Module):
    """Two linear layers with something between."""

    def __init__(
        self, between: Callable[[Tensor, nn.Module], Tensor], width: int, back: int, **more: nn.Module
    ) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Linear(6, width), nn.Linear(back, 5), between
        for name, module in more.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x), self))


def program_of(module: nn.Module, batch: dict[str, Tensor]) -> tuple[Program, Dimensions]:
    program = capture(open_source(module.eval()), batch)
    return program, coupled_dimensions(program)
