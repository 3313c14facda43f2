"""Where activations wait: on the GPU while it has room, in memory within the budget, in a file past it."""

from __future__ import annotations

import torch
from support.fake_gpu import CPU, GPU, FakeGPU, Tagged
from torch import Tensor

from sparsify.calibration.activations import ActivationStore


def value(number: int, there: bool = False) -> Tensor:
    """A kibibyte."""
    made = torch.full((256,), float(number))
    return made.to(GPU) if there else made


def test_a_gpu_comes_first_then_memory_then_a_file() -> None:
    with FakeGPU(free=8 << 10) as gpu, ActivationStore(3 << 10, GPU) as store:
        # A quarter of what is free, so that a region has the rest.
        assert store.room == 2 << 10
        for number in range(4):
            store.put(number, "x", value(number, there=True))
        assert (store.room, store.held, store.spilled) == (0, 3 << 10, 1 << 10)
        assert sum(gpu.waited.values()) == 4 + 2, "those that were made, and two that had to leave"
        for number in range(4):
            for keep in (True, False):
                found = store.take(number, "x", GPU, keep=keep)
                assert isinstance(found, Tagged) and torch.equal(found, value(number, there=True))
        assert (store.room, store.held) == (2 << 10, 0)


def test_the_budget_holds_on_a_gpu_too() -> None:
    with FakeGPU(free=1 << 30), ActivationStore(1 << 10, GPU) as store:
        for number in range(2):
            store.put(number, "x", value(number, there=True))
        assert store.held == store.spilled == 1 << 10
    with FakeGPU(free=1 << 30), ActivationStore(1 << 20) as elsewhere:
        elsewhere.put(0, "x", value(1, there=True))
        assert elsewhere.room == 0 and not isinstance(elsewhere.take(0, "x", CPU), Tagged)


def test_a_part_of_a_tensor_counts_as_all_of_it_where_all_of_it_stays() -> None:
    with FakeGPU(free=1 << 30), ActivationStore(1 << 20, GPU) as store:
        whole = value(1, there=True)
        store.put(0, "x", whole[:4])
        assert store.held == 1 << 10
        store.take(0, "x", GPU)
        assert store.held == 0
        store.put(0, "x", whole.cpu()[:4])
        assert store.held == 16


def test_a_value_takes_the_place_of_an_older_one() -> None:
    with ActivationStore(1 << 10) as store:
        for number in range(3):
            store.put(0, "in memory", value(number))
            store.put(0, "in a file", value(-number))
        assert store.held == store.spilled == 1 << 10
        assert torch.equal(store.take(0, "in memory", CPU), value(2))  # type: ignore[arg-type]
        assert torch.equal(store.take(0, "in a file", CPU), value(-2))  # type: ignore[arg-type]
        assert store.held == 0
        store.put(0, "a number", 7)
        assert store.take(0, "a number", CPU) == 7
