"""Layers that loop over the sequence: one node for each loop, and everything as the model itself computes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from support.families import inputs, run
from support.recurrent import RECURRENT, recurrent
from support.regions import execute
from torch import Tensor, nn

import sparsify
from sparsify.analysis.dimensions.groups import coupled_dimensions
from sparsify.errors import TraceError
from sparsify.frontend.capture import capture
from sparsify.frontend.source import open_source
from sparsify.frontend.tracing import recurrences
from sparsify.ir.operators import exact_name
from sparsify.ir.program import Program
from sparsify.runtime.cpu.wide import wide_products

# One of each function that is kept whole.
EACH = ("qwen3_5", "kimi_linear", "mamba", "rwkv")


def slow(*values: str) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def traced(family: str, layers: int = 2, length: int = 20) -> Program:
    return capture(open_source(recurrent(family, layers)), inputs("llama", length=length))


@contextmanager
def unrolled() -> Iterator[None]:
    """Capture as torch traces: every step of a loop is nodes of its own."""
    with patch.object(recurrences, "FUNCTIONS", ()):
        yield


@pytest.mark.first(4)
@pytest.mark.parametrize("family", RECURRENT)
def test_the_graph_equals_the_eager_model_bit_for_bit(family: str) -> None:
    model, batch = recurrent(family), inputs("llama", length=20)
    program = capture(open_source(model), batch)
    for seed in (0, 1):
        batch = inputs("llama", length=20, seed=seed)
        assert torch.equal(execute(program, [batch])[0], run(model, batch))


@pytest.mark.first(1)
@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_5", "rwkv", *(slow(name) for name in ("kimi_linear", "mamba", "mamba2"))])
def test_nodes_do_not_grow_with_the_sequence_and_are_linear_in_depth(family: str) -> None:
    # Four layers are one period of Qwen3.5's kinds of layer.
    short, long = traced(family, 4, length=24), traced(family, 4, length=200)
    assert len(short.nodes) == len(long.nodes) < 150 * 4
    eight, twelve = (len(traced(family, layers, length=24).nodes) for layers in (8, 12))
    # Kimi's first layers are of other kinds.
    assert twelve - eight <= eight - len(short.nodes)


@pytest.mark.first(1)
@pytest.mark.slow
@pytest.mark.parametrize(
    "family", [*map(slow, ("jamba", "qwen3_next", "falcon_mamba", "olmo_hybrid", "qwen3_5")), *EACH[1:]]
)
def test_dimensions_are_those_of_the_unrolled_graph(family: str) -> None:
    def groups(program: Program) -> Any:
        found = coupled_dimensions(program)
        assert not found.without_rule
        return Counter(
            (group.free.tolist().__repr__(), *((m.parameter, m.axis, m.channel.tolist().__repr__()) for m in members))
            for group in found.prunable
            for members in [sorted(group.members, key=lambda m: (m.parameter, m.axis))]
        )

    with unrolled():
        steps = traced(family)
    whole = traced(family)
    assert len(whole.nodes) < len(steps.nodes) / 1.5
    assert groups(whole) == groups(steps)


QUICK = {("mamba", "gblm:2:4"), ("mamba", "llm-pruner:0.3"), ("qwen3_5", "wanda:2:4")}
# Kimi's heads and widths are too small here to lose any.
PAIRS = [(f, s) for f in EACH for s in ("wanda:2:4", "gblm:2:4", "llm-pruner:0.3") if (f, s[:3]) != (EACH[1], "llm")]


@pytest.mark.first(1)
@pytest.mark.slow
@pytest.mark.parametrize(("family", "spec"), [pair if pair in QUICK else slow(*pair) for pair in PAIRS])
def test_outputs_are_those_of_the_unrolled_graph(family: str, spec: str, tmp_path: Path) -> None:
    """Statistics, gradients through the function, and channels taken out of it."""
    recurrent(family).save_pretrained(tmp_path / "model")
    batches = [inputs("llama", length=20, seed=seed) for seed in (1, 2)]

    def compiled(name: str) -> dict[str, Tensor]:
        sparsify.compile(tmp_path / "model", [spec], calibration=batches, output=tmp_path / name)
        return load_file(tmp_path / name / "model.safetensors")

    whole = compiled("whole")
    with unrolled():
        steps = compiled("steps")
    assert whole.keys() == steps.keys() and all(torch.equal(whole[name], steps[name]) for name in steps)


@pytest.mark.parametrize("family", EACH)
def test_a_node_calls_the_models_own_function(family: str) -> None:
    program = traced(family)
    nodes = [node for node in program.graph.nodes if exact_name(node) in recurrences.FUNCTIONS]
    modules = {type(part).__module__ for part in recurrent(family).modules()}
    assert nodes and all(node.target.__module__ in modules for node in nodes)
    # Nothing of the trace is left: neither torch's operator nor a function that was put in the place of another.
    assert "call" not in dir(torch.ops.sparsify_recurrences)
    assert not any("stand_in" in getattr(node.target, "__qualname__", "") for node in nodes)
    program.verify()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    """To the bit, where products of 16-bit numbers go by way of float32 in both or in neither."""
    model, batch = recurrent("qwen3_5").to(dtype), inputs("llama", length=20)
    with wide_products():
        due = run(model, batch)
    assert torch.equal(execute(capture(open_source(model), batch), [batch])[0], due)


def _function(kind: str) -> Callable[..., Any]:
    def rwkv_linear_attention(x: Tensor, y: Any = None) -> Any:
        total = x
        for _ in range(4):
            total = total * 2 + (y["more"] if isinstance(y, dict) else 0)
        return {"a list": [total, None], "a dict": {"of": total}, "nested": (total, [total])}.get(kind, total)

    return rwkv_linear_attention


@pytest.mark.parametrize("kind", ["a tensor", "a list", "a dict", "nested", "an odd argument"])
def test_what_a_function_may_give(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be one node is traced step by step, and is as right."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            called = globals()["rwkv_linear_attention"]
            y = called(x, slice(1)) if kind == "an odd argument" else called(x, {"more": x})
            while not isinstance(y, Tensor):
                y = next(iter(y.values() if isinstance(y, dict) else y))
            return y

    monkeypatch.setitem(globals(), "rwkv_linear_attention", _function(kind))
    net, x = Net().eval(), torch.randn(2, 8)
    program = capture(open_source(net), {"0": x})
    kept = [node for node in program.graph.nodes if exact_name(node) == "rwkv_linear_attention"]
    assert len(kept) == (kind in ("a tensor", "a list"))
    assert torch.equal(execute(program, [{"0": x}])[0], net(x))


def test_what_fails_inside_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def rwkv_linear_attention(x: Tensor) -> Tensor:
        raise ValueError("a sequence too long for it")

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return globals()["rwkv_linear_attention"](x)

    monkeypatch.setitem(globals(), "rwkv_linear_attention", rwkv_linear_attention)
    with pytest.raises(TraceError, match="a sequence too long for it"):
        capture(open_source(Net()), {"0": torch.randn(2, 8)})
    assert globals()["rwkv_linear_attention"] is rwkv_linear_attention
