from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build, inputs, run
from torch import Tensor, fx, nn

from sparsify.analysis.flow import Flow
from sparsify.calibration.activations import ActivationStore
from sparsify.calibration.interpreter import Interpreter
from sparsify.errors import TraceError
from sparsify.frontend.capture import capture, from_exported
from sparsify.frontend.source import open_source
from sparsify.ir.program import Program

CPU = torch.device("cpu")


def execute(program: Program, batches: list[dict[str, Tensor]], cuts: int = 3, budget: int = 1 << 30) -> list[Any]:
    """Run the whole graph in a few regions and return its first output for each batch."""
    flow = Flow.of(program)
    output = next(n for n in program.graph.nodes if n.op == "output")
    first = next(iter(output.all_input_nodes))
    leaf = output.args[0]
    while not isinstance(leaf, fx.Node):
        leaf = next(iter(leaf))
    first, results = leaf, [None] * len(batches)
    end = len(flow.order)
    edges = sorted({0, *(end * i // cuts for i in range(1, cuts)), end})
    with ActivationStore(budget) as store, torch.no_grad():
        runner = Interpreter(program, flow, batches, store, CPU)
        for start, stop in zip(edges, edges[1:], strict=False):

            def keep(index: int, node: fx.Node, values: dict[fx.Node, Any]) -> None:
                results[index] = values[node].clone()

            inside = {first} if start <= flow.position[first] < stop else None
            runner.region(start, stop, end, watch=inside, on_value=keep)
        assert not runner.resident, "every weight is freed"
    return results


@pytest.mark.parametrize("family", FAMILIES)
def test_the_graph_of_a_folder_equals_the_eager_model(family: str, folder: Callable[[str], Path]) -> None:
    model = type(build(family)).from_pretrained(folder(family)).eval()
    batches = [inputs(family, seed=1), inputs(family, seed=2)]
    program = capture(open_source(folder(family)), batches[0])
    for batch, result in zip(batches, execute(program, batches), strict=True):
        torch.testing.assert_close(result, run(model, batch), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "opt", "mixtral", "falcon"])
def test_attention_masks_reach_the_graph(family: str, folder: Callable[[str], Path]) -> None:
    model = type(build(family)).from_pretrained(folder(family)).eval()
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, 9:] = 0
    batch = inputs(family, attention_mask=mask)
    program = capture(open_source(folder(family)), batch)
    result = execute(program, [batch])[0]
    torch.testing.assert_close(result, run(model, batch), rtol=0, atol=1e-6)


def test_a_spill_to_disk_changes_nothing(folder: Callable[[str], Path]) -> None:
    batches = [inputs("llama", seed=s) for s in range(3)]
    program = capture(open_source(folder("llama")), batches[0])
    whole, spilled = execute(program, batches, cuts=7), execute(program, batches, cuts=7, budget=1000)
    assert all(torch.equal(a, b) for a, b in zip(whole, spilled, strict=True))


def test_a_module_in_memory_is_left_as_it_is(ids: Tensor) -> None:
    model = build("llama").train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    program = capture(open_source(model), {"input_ids": ids})
    assert model.training
    result = execute(program, [{"input_ids": ids}])[0]
    assert torch.equal(result, run(model.eval(), {"input_ids": ids}))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


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


@pytest.mark.parametrize("cuts", [1, 2, 5, 9])
def test_any_module_in_regions(cuts: int) -> None:
    torch.manual_seed(0)
    module = Plain().eval()
    batches = [{"0": torch.randn(4, 8)} for _ in range(3)]
    program = capture(open_source(module), batches[0])
    for batch, result in zip(batches, execute(program, batches, cuts), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(result, module(batch["0"]), rtol=0, atol=1e-6)


def test_positional_and_keyword_inputs() -> None:
    torch.manual_seed(0)
    module = Plain().eval()
    batch = {"0": torch.randn(4, 8), "extra": torch.randn(4, 8)}
    program = capture(open_source(module), batch)
    with torch.no_grad():
        expected = module(batch["0"], extra=batch["extra"])
    torch.testing.assert_close(execute(program, [batch])[0], expected)


def test_an_exported_program() -> None:
    torch.manual_seed(0)
    module, x = Plain().eval(), torch.randn(4, 8)
    with torch.no_grad():
        program = from_exported(torch.export.export(module, (x,)))
        torch.testing.assert_close(execute(program, [{"0": x}])[0], module(x))


def test_the_program_lints_and_runs_as_a_graph_module() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    program = capture(open_source(module), {"0": torch.randn(2, 4)})
    program.verify()
    assert [n.op for n in program.graph.nodes].count("get_attr") == 2
    assert "aten.linear" in program.graph_module.code


def test_control_flow_on_values_is_a_trace_error() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(TraceError, match=r"torch\.export fails"):
        capture(open_source(Branch()), {"0": torch.randn(2, 4)})


def test_a_failing_node_names_its_source_line(folder: Callable[[str], Path]) -> None:
    batch = inputs("llama")
    program = capture(open_source(folder("llama")), batch)
    with pytest.raises(TraceError, match=r"aten\.embedding.*modeling_llama"):
        execute(program, [{"input_ids": torch.full((2, 16), 64)}])
