"""What is timed to choose by, and what is concluded from it."""

from __future__ import annotations

import time

import pytest
import torch

from sparsify.runtime.cpu.stopwatch import MANY, Stopwatch, Timing
from sparsify.runtime.packed_weight import PackedWeight


def weight_24() -> torch.Tensor:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    weight.view(-1, 4)[:, 2:] = 0
    return weight


@pytest.mark.parametrize(
    ("timing", "slower"),
    [
        (Timing(2.0, 1.0, 1.2, 1, {8: 1.9, 32: 1.9}), None),
        (Timing(2.0, 1.0, 1.3, 1, {8: 0.5, 32: 0.5}), "takes 1.30× its time"),
        (Timing(1.0, 2.0, 0.5, 1, {8: 1.1, 32: 2.5}), "takes 2.50× its time for 32 tokens"),
        (Timing(1.0, 2.0, 0.5, 1), None),
    ],
)
def test_packed_unless_it_is_clearly_slower(timing: Timing, slower: str | None) -> None:
    assert timing.slower == slower and timing.pays is (slower is None)


def test_a_choice_is_made_on_one_thread_and_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen: list[int] = []
        product = PackedWeight.of(weight_24(), "packed24")
        timing = Stopwatch(flush=False).packed(weight_24(), product)
        assert timing.threads == 1 and set(timing.many) == set(MANY) and torch.get_num_threads() == 2
        Stopwatch(flush=False).race([lambda: seen.append(torch.get_num_threads())])
        assert set(seen) == {1}
        assert Stopwatch(flush=False, alone=False).packed(weight_24(), product).threads == 2
        with pytest.raises(ValueError, match="invalid literal"):
            Stopwatch(flush=False).race([lambda: int("x")])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_time_that_others_take_does_not_count() -> None:
    """A call that waits, as every call does where another program has the core, is no slower for it."""
    work = torch.randn(256, 256)
    waits, works = Stopwatch(flush=False).race([lambda: time.sleep(0.02), lambda: [work @ work for _ in range(40)]])
    assert waits < works
    (clock,) = Stopwatch(flush=False, alone=False).race([lambda: time.sleep(0.02)])
    assert clock >= 0.02
