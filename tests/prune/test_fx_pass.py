"""Passes in other compilers' pipelines: torch's PassManager, torch.compile, torch.export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.families import build
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.passes.infra.pass_manager import PassManager

import sparsify
from sparsify.errors import CalibrationError, SparsifyError, TraceError
from sparsify.method.pattern import NM
from sparsify.passes import Magnitude, Wanda
from sparsify.prune.fx_pass import GraphPrune


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu()) + x


@pytest.fixture
def x() -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def follows(weight: Tensor) -> bool:
    return bool(((weight != 0).view(-1, 4).sum(1) == 2).all())


def expected(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    result = sparsify.compile(net, ["wanda:2:4"], calibration=[x])
    return {name: result.weight(f"{name}.weight") for name in ("up", "down")}


def test_in_torchs_pass_manager(x: Tensor) -> None:
    net = Net()
    graph = fx.symbolic_trace(net)
    result = PassManager([GraphPrune(Wanda(NM(2, 4)), [x])], run_checks_after_each_pass=True)(graph)
    assert result.modified
    for name, weight in expected(net, x).items():
        assert torch.equal(result.graph_module.get_submodule(name).weight, weight)
    with torch.no_grad():
        assert not torch.equal(result.graph_module(x), net(x))
    assert not follows(net.up.weight), "the module given is not changed"


def test_an_input_may_be_a_parameter_of_somebody_elses(x: Tensor) -> None:
    """Parameters are weights only where all placeholders were given, weights among them."""
    graph = fx.symbolic_trace(Net())
    plain = GraphPrune(Wanda(NM(2, 4)), [(x,)])(graph)
    held = GraphPrune(Wanda(NM(2, 4)), [(nn.Parameter(x),)])(graph)
    assert isinstance(plain, PassResult) and isinstance(held, PassResult)
    assert torch.equal(plain.graph_module.up.weight, held.graph_module.up.weight)


def test_called_directly_with_its_inputs(x: Tensor) -> None:
    result = GraphPrune(Wanda(NM(2, 4)), [x[:4], x[4:]])(fx.symbolic_trace(Net()))
    assert isinstance(result, PassResult) and follows(result.graph_module.up.weight)


def test_two_passes_in_one_manager(x: Tensor) -> None:
    passes = [GraphPrune(Magnitude(NM(3, 4)), [x]), GraphPrune(Wanda(NM(2, 4)), [x])]
    assert follows(PassManager(passes)(fx.symbolic_trace(Net())).graph_module.up.weight)


@pytest.mark.parametrize("lifted", [True, False])
def test_on_an_exported_program(x: Tensor, lifted: bool) -> None:
    exported = torch.export.export(Net().eval(), (x,))
    result = GraphPrune(Wanda(NM(2, 4)), [x])(exported if lifted else exported.module())  # type: ignore[arg-type]
    pruned = dict(result.graph_module.named_parameters())
    assert follows(pruned["up.weight"]) and follows(pruned["down.weight"])
    assert not follows(exported.state_dict["up.weight"])


def test_from_a_torch_compile_backend(x: Tensor) -> None:
    net, seen = Net(), {}

    def backend(graph: fx.GraphModule, example_inputs: list[Any]) -> Any:
        result = PassManager([GraphPrune(Wanda(NM(2, 4)), [x], example_inputs=example_inputs)])(graph)
        seen["graph"] = result.graph_module
        return result.graph_module.forward

    with torch.no_grad():
        compiled = torch.compile(net, backend=backend)(x)
        weights = expected(net, x)
        by_hand = nn.functional.linear(x, weights["up"], net.up.bias).relu()
        by_hand = nn.functional.linear(by_hand, weights["down"], net.down.bias) + x
    torch.testing.assert_close(compiled, by_hand)
    assert sum(follows(p) for _, p in seen["graph"].named_parameters()) == 2


@pytest.mark.first(1)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_language_model_from_a_torch_compile_backend(dynamic: bool) -> None:
    """Sizes that are left open come as numbers beside the tensors, as they do once a second shape was seen."""
    torch._dynamo.reset()
    model = build("llama")
    ids = torch.randint(3, 60, (2, 16), generator=torch.Generator().manual_seed(0))

    def backend(graph: fx.GraphModule, example_inputs: list[Any]) -> Any:
        bound = GraphPrune(Wanda(NM(2, 4)), example_inputs=example_inputs, ignore=["re:.*lm_head.*"])
        return bound(graph).graph_module.forward  # type: ignore[union-attr]

    with torch.no_grad():
        compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(ids, use_cache=False).logits
        pruned = sparsify.compile(model, ["wanda:2:4"], calibration=[ids]).model(ids, use_cache=False).logits
    torch.testing.assert_close(compiled, pruned, rtol=0, atol=1e-5)


def test_what_is_no_graph_or_has_no_inputs(x: Tensor) -> None:
    with pytest.raises(TraceError, match=r"use sparsify\.compile"):
        GraphPrune(Wanda(NM(2, 4)), [x])(Net())  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="no calibration batches"):
        GraphPrune(Wanda(NM(2, 4)))(fx.symbolic_trace(Net()))
    with pytest.raises(TraceError, match="placeholders"):
        GraphPrune(Wanda(NM(2, 4)), [x], example_inputs=[x, x])(fx.symbolic_trace(Net()))


def test_names_that_match_nothing(x: Tensor) -> None:
    with pytest.raises(SparsifyError, match="matches no parameter"):
        GraphPrune(Wanda(NM(2, 4)), [x], only=["middle"])(fx.symbolic_trace(Net()))
