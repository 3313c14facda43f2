"""The graph as text: what stands in it, and that two texts differ exactly where two programs do."""

from __future__ import annotations

import difflib
from pathlib import Path

import torch
from torch import nn

import sparsify
from sparsify.frontend.capture import capture
from sparsify.frontend.source import open_source
from sparsify.inspection.graph import graph_text, inspect_graph


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 4)
        self.register_buffer("scale", torch.full((8,), 2.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.relu(self.one(x)) * self.scale)


EXPECTED = """\
graph of Net
inputs:
  0 [3, 8] float32
parameters:
  one.weight [8, 8] float32, 50.00% zeros, 2:4
  one.bias [8] float32, 0.00% zeros
  two.weight [4, 8] float32, 50.00% zeros, 2:4
  two.bias [4] float32, 0.00% zeros
nodes:
"""


def test_everything_is_there_and_nothing_changes() -> None:
    made = sparsify.compile(Net(), ["magnitude:2:4"], calibration=[torch.randn(3, 8)])
    text = graph_text(made.program)
    assert text.startswith(EXPECTED) and text == graph_text(made.program)
    assert "  linear = linear(input_0, one_weight, one_bias) [3, 8] float32" in text
    assert "constant" in text and "  return [linear_1]" in text
    assert text.endswith(
        "sites:\n"
        "  one: 8 output neurons × 8 inputs, reads input_0 at linear\n"
        "  two: 4 output neurons × 8 inputs, reads mul at linear_1"
    )


def test_two_texts_differ_where_two_programs_do() -> None:
    data = [torch.randn(3, 8)]
    one, other = (graph_text(sparsify.compile(Net(), [spec], calibration=data).program).splitlines()
                  for spec in ("magnitude:2:4", "magnitude:25%"))  # fmt: skip
    changed = [line for line in difflib.ndiff(one, other) if line[0] in "+-"]
    assert len(changed) == 4 and all("zeros" in line for line in changed)


def test_of_a_folder_it_is_what_inspect_prints(bundled: Path) -> None:
    text = inspect_graph(bundled)
    assert text.startswith("graph of LlamaForCausalLM\ninputs:\n  input_ids [1, 16] int64\n")
    assert text == graph_text(capture(open_source(bundled), {"input_ids": torch.zeros(1, 16, dtype=torch.long)}))
