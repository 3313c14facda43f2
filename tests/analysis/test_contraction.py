"""Which nodes count as products with a constant weight, in graphs of other compilers, and with what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.matrices import error, pruned_24
from torch import Tensor, fx, nn
from torch.nn import functional

from sparsify.analysis.contraction import find_contractions
from sparsify.passes import LowerSparse

SMALLEST = LowerSparse(choice="smallest")


class Factors(nn.Module):
    """addmm with the factors that torch gives it."""

    def __init__(self, **factors: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(pruned_24(64, 64).t().contiguous()), nn.Parameter(torch.randn(64))
        self.factors = factors

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight, **self.factors)


@pytest.mark.parametrize("factors", [{}, {"alpha": 2}, {"beta": 0.5}, {"alpha": 1, "beta": 1}, {"beta": 0}])
def test_addmm_with_factors_stays_as_it_is(factors: dict[str, Any]) -> None:
    net, x = Factors(**factors), torch.randn(5, 64)
    graph = fx.symbolic_trace(net)
    found, lost = find_contractions(graph, {})
    plain = all(value == 1 for value in factors.values())
    assert len(found) == plain and [item.reason for item in lost] == ["addmm with factors"] * (not plain)
    with torch.no_grad():
        lowered = SMALLEST(graph)
        assert lowered.modified == plain
        assert error(lowered.graph_module(x), net(x).double()) < 1e-5


@pytest.mark.parametrize("kind", ["forward", "before", "none", "subclass"])
def test_a_linear_with_code_of_the_users_is_left_alone(kind: str) -> None:
    """A hook sees or changes what goes in or comes out: a packed product would run without it."""

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer = (Doubled if kind == "subclass" else nn.Linear)(64, 64)
    with torch.no_grad():
        layer.weight.copy_(pruned_24(64, 64))
    net, x = nn.Sequential(layer), torch.randn(5, 64)

    class Leaves(fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, nn.Linear)

    graph = fx.GraphModule(net, Leaves().trace(net))
    held = graph.get_submodule("0")
    if kind == "forward":
        held.register_forward_hook(lambda module, args, out: out + 1)
    if kind == "before":
        held.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    with torch.no_grad():
        want = graph(x)
        lowered = SMALLEST(graph)
        assert lowered.modified == (kind == "none")
        assert error(lowered.graph_module(x), want.double()) < 1e-5


class BothWays(nn.Module):
    """One square weight, read as it is and turned; both ways 2:4 along the inputs."""

    def __init__(self) -> None:
        super().__init__()
        block = torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]])
        self.weight = nn.Parameter(torch.randn(64, 64) * block.repeat(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight) - functional.linear(x, self.weight.t())


@pytest.mark.parametrize("merge", [True, False])
def test_a_weight_and_its_transpose_are_two(merge: bool) -> None:
    """They share memory, shape and dtype."""
    torch.manual_seed(0)
    net, x = BothWays(), torch.randn(3, 64)
    with torch.no_grad():
        lowered = LowerSparse(choice="smallest", merge=merge)(fx.symbolic_trace(net))
        assert [r.layout for r in lowered.graph_module.meta["sparsify"]] == ["packed24", "packed24"]
        assert error(lowered.graph_module(x), net(x).double()) < 1e-5


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack, self.gates = nn.Parameter(torch.randn(3, 8, 8)), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        x = functional.linear(x, self.stack[1].T.contiguous())
        x = x @ self.stack.transpose(1, 2).select(0, 2)
        x = self.gates @ x
        x = functional.linear(x, self.gates * gate)  # a product of an activation with the weight is no constant
        return torch.bmm(x.unsqueeze(0), self.stack[:1])


def test_views_are_followed_and_what_is_no_constant_is_not() -> None:
    net = Views()
    found, lost = find_contractions(fx.symbolic_trace(net), {})
    assert [(c.name, c.weight.shape) for c in found] == [("stack[1]", (8, 8)), ("stack[2]", (8, 8))]
    assert torch.equal(found[0].weight, net.stack[1].t()) and torch.equal(found[1].weight, net.stack[2])
    assert [(item.name, item.reason) for item in lost] == [
        ("gates", "the weight stands on the left of the activation"),
        ("stack[slice(None, 1, None)]", "the operator bmm has no packed form"),
    ]
