"""Parameters written through the conversions of transformers: all of what was asked for arrives, or an error comes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparsify.errors import CheckpointError
from sparsify.frontend.source import open_source
from sparsify.ir.store import MemoryStore
from sparsify.ir.weights import Conversion, Weights
from sparsify.tensors import same_bits

STACK = "model.layers.0.mlp.experts.gate_up_proj"


class Rounding(MemoryStore):
    """A store that keeps less than it is given."""

    def write(self, name: str, tensor: Tensor) -> None:
        super().write(name, tensor.round(decimals=1))


@pytest.fixture
def weights(folder: Callable[[str], Path]) -> Weights:
    return open_source(folder("mixtral")).weights


def test_a_stack_of_experts_is_written_as_the_tensors_that_it_is_made_of(weights: Weights) -> None:
    copy = weights.on(MemoryStore(weights.store))
    before = weights.read(STACK)
    copy.write(STACK, before + 1)
    assert torch.equal(copy.read(STACK), before + 1) and torch.equal(weights.read(STACK), before)
    assert copy.written == {STACK} and not weights.written
    some = weights.sources(STACK)[0]
    part = weights.on(MemoryStore(weights.store))
    part.write(STACK, before + 1, {some})
    changed = [n for n in weights.store.names() if not torch.equal(part.store.read(n), weights.store.read(n))]
    assert changed == [some]
    assert int((part.read(STACK) != before).sum()) == before.numel() // 8


def test_a_conversion_that_does_not_come_back_is_refused(weights: Weights) -> None:
    lossy = weights.on(Rounding(weights.store))
    with pytest.raises(CheckpointError, match=r"gate_up_proj: reading it back gives other values"):
        lossy.write(STACK, weights.read(STACK))
    lossy.write(STACK, weights.read(STACK).round(decimals=1))


def test_what_is_not_a_number_comes_back_too(weights: Weights) -> None:
    """With allow_nan a stack may hold NaN, which equals nothing."""
    copy, value = weights.on(MemoryStore(weights.store)), weights.read(STACK).clone()
    value.view(-1)[:2] = torch.tensor([torch.nan, torch.inf])
    copy.write(STACK, value)
    assert same_bits(copy.read(STACK), value)


def test_a_conversion_to_other_tensors_than_the_folders_is_refused(folder: Callable[[str], Path]) -> None:
    weights = open_source(folder("mixtral")).weights
    conversion = weights.conversion(STACK)
    assert conversion is not None and weights.conversion("lm_head.weight") is None
    value = weights.read(STACK)
    conversion.sources.append(("a.tensor.of.an.older.version", conversion.sources[0][1]))
    with pytest.raises(CheckpointError, match=r"transformers turns it back into .*the folder holds"):
        weights.on(MemoryStore(weights.store)).write(STACK, value)


def test_one_of_two_parameters_that_a_tensor_holds_is_written_and_the_other_stays() -> None:
    """A checkpoint with queries and keys in one tensor, for a model that has them apart."""
    loading = pytest.importorskip("transformers.core_model_loading")
    converter = loading.WeightConverter(["qk"], ["query", "key"], operations=[loading.Chunk(dim=0)])
    shapes = {name: torch.Size((2, 3)) for name in ("query", "key")}
    conversion = Conversion(converter, [("qk", "qk")], ["query", "key"], shapes)
    store = MemoryStore(None, {"qk": torch.arange(12.0).view(4, 3)})
    model = torch.nn.Module()
    model.config = None  # type: ignore[assignment]
    weights = Weights(store, {}, dict.fromkeys(shapes, conversion), {}, model, [converter])
    assert torch.equal(weights.read("key"), store.read("qk")[2:]) and weights.sources("query") == ["qk"]
    weights.write("query", torch.zeros(2, 3))
    assert not weights.read("query").any() and weights.read("key").tolist() == [[6, 7, 8], [9, 10, 11]]
