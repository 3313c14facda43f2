"""Zeros and training in several processes: safe where each holds weights whole, refused by name where none does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.held import learn, pruned, unchanged, zeros
from torch import distributed, nn

import sparsify
from sparsify.errors import SpecError

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch without its distributed part")


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("inner", [False, True])
def test_data_parallel_training_holds_them(inner: bool) -> None:
    """Whether the wrapped model is given, or the model itself."""
    model = pruned()
    before = zeros(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    with sparsify.hold_zeros(model if inner else wrapped):
        learn(wrapped, torch.optim.AdamW(wrapped.parameters(), lr=1e-2, weight_decay=0.1))
    assert unchanged(before, model)
    learn(wrapped, torch.optim.AdamW(wrapped.parameters(), lr=1e-2))
    assert not unchanged(before, model), "held beyond the end"


def test_wrapped_once_it_is_held() -> None:
    model = pruned()
    before = zeros(model)
    with sparsify.hold_zeros(model):
        wrapped = nn.parallel.DistributedDataParallel(model)
        learn(wrapped, torch.optim.SGD(wrapped.parameters(), lr=1e-2))
    assert unchanged(before, model)


def shard(model: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def test_sharded_parameters_are_refused() -> None:
    with pytest.raises(SpecError, match=r"FSDP 2 .*DTensor"), sparsify.hold_zeros(shard(pruned())):
        pass
    from torch.distributed.fsdp import FullyShardedDataParallel

    wrapped = FullyShardedDataParallel(pruned(), device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(SpecError, match="sharded by FullyShardedDataParallel"), sparsify.hold_zeros(wrapped):
        pass
    model = pruned()
    # What DeepSpeed gives every parameter that it partitions.
    model.model.embed_tokens.weight.ds_id = 0
    with pytest.raises(SpecError, match="DeepSpeed ZeRO 3"), sparsify.hold_zeros(model):
        pass


def test_sharded_once_it_is_held_is_refused_at_the_first_step() -> None:
    model = pruned()
    with pytest.raises(SpecError, match="DTensor"), sparsify.hold_zeros(model):
        optimizer = torch.optim.SGD(shard(model).parameters(), lr=1e-2)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
