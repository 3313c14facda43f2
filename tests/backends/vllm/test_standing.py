"""Where layers stand in a model, whatever they were called when they were built."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from torch import nn

pytest.importorskip("vllm", reason="vLLM is not installed: make vllm")

from vllm.model_executor.models.utils import WeightsMapper

from sparsify.backends.vllm.standing import Standing, layers_of, name_within


class Inner(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.proj = layer


class Model(nn.Module):
    def __init__(self, blocks: nn.Module, **more: Any) -> None:
        super().__init__()
        vars(self).update(more)
        self.blocks = blocks


def test_the_whole_model_is_found_from_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsify.backends.vllm.standing.LinearBase", nn.Linear)
    standing = Standing()
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    standing.watch(first, Model, None)
    standing.watch(second, Model, None)
    blocks = nn.ModuleList([Inner(first), Inner(second)])
    other = nn.Sequential(nn.Linear(2, 2))
    model = nn.ModuleDict({"layers": blocks, "head": nn.Linear(2, 2)})
    assert standing.model() is model
    found = dict(layers_of(model))
    assert found == {"layers.0.proj": first, "layers.1.proj": second, "head": model["head"]}
    assert other[0] not in found.values()
    # Once: what is built later is another model.
    assert standing.model() is None


def test_a_model_without_a_config_is_given_one() -> None:
    standing, ours, own = Standing(), object(), object()
    layer = nn.Linear(2, 2)
    standing.watch(layer, Model, ours)
    blocks = Inner(layer)
    assert Model(blocks).quant_config is ours
    assert Model(blocks, quant_config=own).quant_config is own
    assert not hasattr(blocks, "quant_config")
    assert not hasattr(Model(Inner(nn.Linear(2, 2))), "quant_config")
    standing.model()
    assert not hasattr(Model(blocks), "quant_config")


def test_parts_that_load_their_own_tensors_rename_them() -> None:
    mapper = WeightsMapper(orig_to_new_prefix={"first.": "second.first."}, orig_to_new_stacked={".q": (".qkv", "q")})
    model = Model(Model(nn.Identity(), hf_to_vllm_mapper=mapper))
    assert name_within(model, "blocks.first.0.q.weight_meta") == "blocks.second.first.0.q.weight_meta"
    assert name_within(model, "first.weight") == "first.weight"


def test_it_is_handed_to_other_processes_before_and_after() -> None:
    standing = Standing()
    assert pickle.loads(pickle.dumps(standing)).model() is None
    standing.watch(nn.Linear(2, 2), Model, None)
    standing.model()
    assert pickle.loads(pickle.dumps(standing))
