"""What tests share in the place of traces of their own: tests/support/traces.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest
import torch
from support.families import build, inputs
from support.onnx_models import shallow
from support.traces import Traces
from torch import nn

from sparsify.backends.onnx.options import Options
from sparsify.backends.onnx.writing import build_graph

CPU = torch.device("cpu")


def theta(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(2)


def activated(model: Any) -> None:
    model.model.layers[1].mlp.act_fn = nn.GELU()


def hooked(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)


def tied(model: Any) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def patched(model: Any) -> None:
    model.model.layers[0].mlp.forward = lambda x: x


def half(model: Any) -> None:
    model.model.norm.half()


def told(model: Any) -> None:
    model.config.rms_norm_eps = 0.5


@pytest.mark.parametrize("change", [theta, activated, hooked, tied, patched, half, told])
def test_models_that_are_alike_share_a_trace_and_others_do_not(
    change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    traced: list[nn.Module] = []
    monkeypatch.setattr("support.traces.attempted", lambda module, *_: (traced.append(module), {}))
    traces, batch = Traces(), inputs("llama")
    for seed in (0, 1):
        traces.attempted(build("llama", seed), batch, CPU)
    assert len(traced) == 1
    traces.attempted(build("llama"), inputs("llama", length=15), CPU)
    traces.attempted(build("llama"), {**batch, "attention_mask": torch.ones(2, 16)}, CPU)
    assert len(traced) == 3
    model = build("llama")
    change(model)
    traces.attempted(model, batch, CPU)
    assert len(traced) == 4


def test_inputs_whose_numbers_decide_are_compared_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[nn.Module] = []
    monkeypatch.setattr("support.traces.attempted", lambda module, *_: (traced.append(module), {}))
    traces = Traces()
    for grid in (2, 2, 4):
        traces.attempted(build("llama"), {**inputs("llama"), "image_grid_thw": torch.tensor([[1, grid, grid]])}, CPU)
    assert len(traced) == 2


@pytest.mark.slow
def test_a_graph_of_onnx_is_the_one_that_would_have_been_traced() -> None:
    traces, batch = Traces(), {"input_ids": torch.zeros(1, 8, dtype=torch.long)}
    models = [shallow("llama") for _ in range(3)]
    options = Options(weights="external")
    made = [traces.build_graph(models[0], batch, Options()), traces.build_graph(models[1], batch, options)]
    assert len(traces.graphs) == 1
    # Twice traced is the same to the byte, too.
    made.append(build_graph(models[2], batch, options))
    assert len({ir.to_proto(model).SerializeToString() for model, _, _ in made}) == 1
    assert made[0][0] is not made[1][0]
    named = [{name: value.name for name, value in parameters.items()} for _, parameters, _ in made]
    assert named[0] == named[1] == named[2]
    for model, parameters, _ in made:
        assert not [value for value in parameters.values() if value in model.graph.inputs]
        assert all(value.uses() for value in parameters.values())
