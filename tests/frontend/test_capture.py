"""Every family and many a module as a graph that computes what the model computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.families import FAMILIES, build, inputs, run, save
from support.regions import Plain, execute
from torch import Tensor, nn

from sparsify.errors import TraceError
from sparsify.frontend.capture import capture, from_exported
from sparsify.frontend.source import open_source
from sparsify.ir.program import Program


@pytest.mark.parametrize("family", FAMILIES)
def test_the_graph_of_a_folder_equals_the_eager_model(family: str, captured: Callable[[str], Program]) -> None:
    model, batches = build(family), [inputs(family, seed=1), inputs(family, seed=2)]
    for batch, result in zip(batches, execute(captured(family), batches), strict=True):
        torch.testing.assert_close(result, run(model, batch), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "opt", "mixtral", "falcon"])
def test_attention_masks_reach_the_graph(family: str, folder: Callable[[str], Path]) -> None:
    model = build(family)
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, 9:] = 0
    batch = inputs(family, attention_mask=mask)
    program = capture(open_source(folder(family)), batch)
    result = execute(program, [batch])[0]
    torch.testing.assert_close(result, run(model, batch), rtol=0, atol=1e-6)


def test_a_module_in_memory_is_left_as_it_is(ids: Tensor) -> None:
    model = build("llama").train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    program = capture(open_source(model), {"input_ids": ids})
    assert model.training
    result = execute(program, [{"input_ids": ids}])[0]
    assert torch.equal(result, run(model.eval(), {"input_ids": ids}))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


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


def test_an_input_that_nothing_reads_is_named(tmp_path: Path) -> None:
    """A forward that takes any keyword takes a misspelt mask."""
    batch = {**inputs("llama"), "atention_mask": torch.ones(2, 16, dtype=torch.long)}
    with pytest.raises(TraceError, match=r"input atention_mask of LlamaForCausalLM: nothing .* attention_mask"):
        capture(open_source(save("llama", tmp_path / "model")), batch)
