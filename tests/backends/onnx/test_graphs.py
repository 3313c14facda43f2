"""Graphs that passes have edited export as they are; stale ones are refused before anything is written."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from support.onnx_models import logits, padded, shallow

from sparsify.backends.onnx import export_onnx, trace_onnx
from sparsify.backends.onnx.running.runner import Runner
from sparsify.backends.onnx.running.session import open_session
from sparsify.errors import SparsifyError


class Net(torch.nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(8, width), torch.nn.Linear(width, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def run(folder: Path, x: torch.Tensor) -> torch.Tensor:
    session = open_session(folder / "model.onnx")
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def traced(net: torch.nn.Module) -> torch.export.ExportedProgram:
    return torch.export.export(net, (torch.zeros(3, 8),), dynamic_shapes=({0: torch.export.Dim("rows")},))


def test_masks_written_into_a_program_are_in_the_file(tmp_path: Path) -> None:
    net, x = Net(), torch.randn(5, 8)
    program = traced(net)
    with torch.no_grad():
        program.state_dict["up.weight"][:, ::2] = 0
    export_onnx(program, tmp_path / "out")
    assert torch.allclose(run(tmp_path / "out", x), net(x), atol=1e-6)
    weight = ir.load(tmp_path / "out" / "model.onnx").graph.initializers["up.weight"].const_value.numpy()
    assert (weight[:, ::2] == 0).all() and (weight[:, 1::2] != 0).all()


def test_a_shrunk_graph_exports_and_equals_a_net_built_small(tmp_path: Path) -> None:
    net, small, x = Net(), Net(12), torch.randn(4, 8)
    with torch.no_grad():
        small.up.weight.copy_(net.up.weight[:12])
        small.up.bias.copy_(net.up.bias[:12])
        small.down.weight.copy_(net.down.weight[:, :12])
        small.down.bias.copy_(net.down.bias)
    module = traced(net).module()
    module.up.weight = torch.nn.Parameter(net.up.weight[:12].detach())
    module.up.bias = torch.nn.Parameter(net.up.bias[:12].detach())
    module.down.weight = torch.nn.Parameter(net.down.weight[:, :12].detach())
    export_onnx(module, tmp_path / "out")
    assert torch.allclose(run(tmp_path / "out", x), small(x), atol=1e-6)


def test_a_stale_program_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    program = traced(Net())
    program._state_dict["up.weight"] = torch.nn.Parameter(torch.zeros(12, 8))
    with pytest.raises(SparsifyError, match=r"up\.weight.*\[12, 8\].*traced with \[16, 8\].*stale"):
        export_onnx(program, tmp_path / "out")
    module = traced(Net()).module()
    module.up.weight = torch.nn.Parameter(torch.zeros(12, 8))
    module.up.bias = torch.nn.Parameter(torch.zeros(12))
    with pytest.raises(SparsifyError, match="does not run any more"):
        export_onnx(module, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_symbolically_traced_module_needs_example_inputs(tmp_path: Path) -> None:
    net, x = Net(), torch.randn(5, 8)
    graph = torch.fx.symbolic_trace(net)
    with pytest.raises(SparsifyError, match="example_inputs"):
        export_onnx(graph, tmp_path / "out")
    export_onnx(graph, tmp_path / "out", example_inputs=[torch.randn(2, 8)])
    assert torch.allclose(run(tmp_path / "out", x), net(x), atol=1e-6)


@pytest.mark.first(1)
@pytest.mark.parametrize("weights", ["link", "external", "packed"])
def test_a_plain_module_exports_with_its_weights_stored_each_way(weights: str, tmp_path: Path) -> None:
    net, x = Net(64), torch.randn(5, 8)
    with torch.no_grad():
        net.down.weight.view(-1, 4)[:, :2] = 0
    export_onnx(net, tmp_path / "out", weights=weights, example_inputs=[torch.randn(2, 8)])
    assert torch.allclose(run(tmp_path / "out", x), net(x), atol=1e-6)


@pytest.mark.slow
def test_a_decoder_traced_edited_and_exported_still_generates(tmp_path: Path) -> None:
    model = shallow("llama")
    program = trace_onnx(model)
    for name, parameter in program.graph_module.named_parameters():
        if name.endswith("down_proj.weight"):
            with torch.no_grad():
                parameter.view(-1, 4)[:, :2] = 0
    # The traced graph shares the model's weights: the model is pruned with it.
    assert float((model.model.layers[0].mlp.down_proj.weight == 0).float().mean()) == 0.5
    export_onnx(program, tmp_path / "out", weights="packed")
    ids, mask = padded()
    runner = Runner(tmp_path / "out")
    got, _ = runner.forward(ids.numpy(), mask.numpy(), runner.empty(2))
    assert np.abs(got - logits(model, ids, mask).numpy())[mask.numpy() == 1].max() <= 1e-5
    assert (tmp_path / "out" / "genai_config.json").exists()


@pytest.mark.slow
def test_an_mlp_shrunk_in_a_traced_decoder(tmp_path: Path) -> None:
    """Against a model whose config says the new width."""
    model = shallow("llama")
    config = copy.deepcopy(model.config)
    config.intermediate_size = 48
    small = transformers.LlamaForCausalLM(config).eval()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    for name in state:
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            state[name] = state[name][:48]
        elif name.endswith("down_proj.weight"):
            state[name] = state[name][:, :48]
    small.load_state_dict(state)
    program = trace_onnx(model)
    for name, tensor in state.items():
        owner, _, leaf = f"model.{name}".rpartition(".")
        setattr(program.graph_module.get_submodule(owner), leaf, torch.nn.Parameter(tensor))
    export_onnx(program, tmp_path / "out")
    ids, mask = padded()
    runner = Runner(tmp_path / "out")
    got, _ = runner.forward(ids.numpy(), mask.numpy(), runner.empty(2))
    assert np.abs(got - logits(small, ids, mask).numpy())[mask.numpy() == 1].max() <= 1e-5
