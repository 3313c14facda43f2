"""Where layers stand in a model, whatever they were called when they were built."""

from __future__ import annotations

import pickle

import pytest
from torch import nn

pytest.importorskip("vllm", reason="vLLM is not installed: make vllm")

from sparsify.backends.vllm.standing import Standing


class Inner(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.proj = layer


def test_the_whole_model_is_found_from_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsify.backends.vllm.standing.LinearBase", nn.Linear)
    standing = Standing()
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    standing.watch(first)
    standing.watch(second)
    blocks = nn.ModuleList([Inner(first), Inner(second)])
    other = nn.Sequential(nn.Linear(2, 2))
    model = nn.ModuleDict({"layers": blocks, "head": nn.Linear(2, 2)})
    found = dict(standing.linear_layers())
    assert found == {"layers.0.proj": first, "layers.1.proj": second, "head": model["head"]}
    assert other[0] not in found.values()
    # Once: what is built later is another model.
    assert not list(standing.linear_layers())


def test_it_is_handed_to_other_processes_before_and_after() -> None:
    standing = Standing()
    assert not list(pickle.loads(pickle.dumps(standing)).linear_layers())
    standing.watch(nn.Linear(2, 2))
    list(standing.linear_layers())
    assert pickle.loads(pickle.dumps(standing))
