"""Numbers of tokens for which a dense copy is the faster one: which are found, and what they say of others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from sparsify.runtime.cpu.stopwatch import Stopwatch
from sparsify.runtime.cpu.turns import COUNTS, are_turns, dense_is_faster, in_words, measure_turns


class Told(Stopwatch):
    """A stopwatch by which the dense product takes so long by its number of tokens, and the packed one a second."""

    def __init__(self, dense: Callable[[int], float]) -> None:
        super().__init__(flush=False)
        self._dense = dense

    def race(self, calls: Sequence[Callable[[], object]], rounds: int = 7) -> list[float]:
        packed, dense = (call() for call in calls)
        assert isinstance(packed, Tensor) and isinstance(dense, Tensor)
        assert packed.shape == dense.shape and packed.dtype == torch.bfloat16
        return [1.0, self._dense(packed.shape[0])]


CASES: dict[str, tuple[Callable[[int], float], list[int], str]] = {
    "never": (lambda tokens: 1.0, [], "no number of tokens"),
    "hardly": (lambda tokens: 0.97, [], "no number of tokens"),
    "always": (lambda tokens: 0.5, [1], "from 1 token on"),
    "of many": (lambda tokens: 0.5 if tokens >= 32 else 2.0, [32], "from 32 tokens on"),
    "of some": (lambda tokens: 0.9 if tokens in (3, 4) else 1.2, [3, 6], "3 to 5 tokens"),
    "twice": (lambda tokens: 0.9 if tokens in (1, 64, 256) else 1.2, [1, 2, 64], "1 token and from 64 tokens on"),
}


@pytest.mark.parametrize("case", CASES)
def test_turns_are_where_the_faster_one_changes(case: str) -> None:
    dense, expected, words = CASES[case]
    found = measure_turns(lambda x: x, lambda x: x, 8, torch.bfloat16, Told(dense))
    assert found == expected and in_words(found) == words and are_turns(found)
    for tokens in COUNTS:
        assert dense_is_faster(found, tokens) == (dense(tokens) < 0.95)


def test_between_two_measured_numbers_the_lower_one_decides() -> None:
    assert [dense_is_faster((4, 6, 64), n) for n in (0, 3, 4, 5, 6, 63, 64, 100000)] == [
        False, False, True, True, False, False, True, True,
    ]  # fmt: skip


@pytest.mark.parametrize("found", [None, 4, "4", [4, 2], [4, 4], [5], [-1], [True], [4.0], {"4": 1}])
def test_what_was_not_measured(found: object) -> None:
    assert not are_turns(found)
