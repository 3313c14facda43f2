"""Measure whether packing pays: a few tokens through a matrix, packed and dense.

Weights come from memory, not from a cache: what a large model does between two uses of one matrix is imitated by
reading a buffer larger than the caches before every call. A choice is made by the CPU time of one thread, the least of
several turns: what other programs do on the machine meanwhile changes wall times, and with them a choice, but hardly
this. (Where other programs keep a core busy two threads wait for one another, in dense products as in packed ones.)
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparsify.runtime.ops import linear_dense
from sparsify.runtime.packed_weight import PackedWeight

# A matrix stays dense where packing it, which always makes it smaller, would leave less than these shares of the dense
# speed: of one token at a time, and of several.
LEAST, LEAST_OF_MANY = 0.8, 0.5
# Our dense kernel is taken where it is that much faster than torch's product.
FASTER = 0.95
# How many tokens at a time are measured beside one.
MANY = (8, 32)
_ROUNDS = 7
_FLUSH = 64 << 20


@dataclass(frozen=True)
class Timing:
    """Seconds that one token takes: through ``F.linear``, through our dense kernel, and packed (None: not measured).

    ``many``: by number of tokens, the time of the packed product by that of the best dense one.
    """

    torch: float
    dense: float
    packed: float | None
    threads: int
    many: Mapping[int, float] = field(default_factory=dict)

    @property
    def best_dense(self) -> float:
        return min(self.torch, self.dense)

    @property
    def pays(self) -> bool:
        """Whether the packed product is not clearly slower than the best dense one."""
        return self.slower is None

    @property
    def slower(self) -> str | None:
        """Where the packed product is clearly slower, or None."""
        if self.ratio * LEAST > 1:
            return f"takes {self.ratio:.2f}× its time"
        worst = max(self.many, key=lambda tokens: self.many[tokens], default=None)
        if worst is not None and self.many[worst] * LEAST_OF_MANY > 1:
            return f"takes {self.many[worst]:.2f}× its time for {worst} tokens"
        return None

    @property
    def ratio(self) -> float:
        """The packed time by that of the best dense product."""
        return math.inf if self.packed is None else self.packed / self.best_dense

    def as_dict(self) -> dict[str, object]:
        def micro(seconds: float | None) -> float | None:
            return None if seconds is None else round(seconds * 1e6, 2)

        return {
            "torch_us": micro(self.torch),
            "dense_us": micro(self.dense),
            "packed_us": micro(self.packed),
            "threads": self.threads,
            "many": {str(tokens): round(ratio, 3) for tokens, ratio in self.many.items()},
        }


class Stopwatch:
    """Times each distinct shape, dtype, layout, grid and tenth of zeros once, and remembers it.

    Args:
        flush: read a buffer larger than the caches before every call, so that weights come from memory.
        alone: on one thread, by its CPU time, to choose by; False takes torch's threads and the clock, to tell what a
            user will see.
    """

    def __init__(self, *, flush: bool = True, alone: bool = True) -> None:
        self._known: dict[tuple[object, ...], Timing] = {}
        self._alone = alone
        self._flush = torch.zeros(_FLUSH // 4 if flush else 1)

    def packed(self, weight: Tensor, packed: PackedWeight) -> Timing:
        """Time ``weight`` [out_features, in_features] against itself packed."""
        own = packed.packed
        tenths = round(10 * own.values.numel() / max(1, weight.numel()))
        kind = (own.layout, own.bits, own.group, packed.exact)
        key = (*kind, *weight.shape, weight.dtype, tenths)
        if key not in self._known:
            self._known[key] = self._time(weight, packed.linear)
        return self._known[key]

    def dense(self, weight: Tensor) -> Timing:
        """Time a weight that is not packed: whether our kernel serves it better than torch's."""
        key = ("dense", *weight.shape, weight.dtype)
        if key not in self._known:
            self._known[key] = self._time(weight, None)
        return self._known[key]

    def _time(self, weight: Tensor, product: Callable[[Tensor], Tensor] | None) -> Timing:
        weight = weight.contiguous()
        one = self._race(1, weight, product)
        threads = 1 if self._alone else torch.get_num_threads()
        if product is None:
            return Timing(one[0], one[1], None, threads)
        raced = {tokens: self._race(tokens, weight, product) for tokens in MANY} if self._alone else {}
        many = {tokens: spent[2] / min(spent[:2]) for tokens, spent in raced.items()}
        return Timing(one[0], one[1], one[2], threads, many)

    def _race(self, tokens: int, weight: Tensor, product: Callable[[Tensor], Tensor] | None) -> list[float]:
        x = torch.randn(tokens, weight.shape[1]).to(weight.dtype)
        calls: list[Callable[[], object]] = [lambda: linear(x, weight), lambda: linear_dense(x, weight)]
        if product is not None:
            calls.append(lambda: product(x))
        return self.race(calls)

    @torch.inference_mode()
    def race(self, calls: Sequence[Callable[[], object]], rounds: int = _ROUNDS) -> list[float]:
        """Seconds of each of ``calls``, taken in turns: of CPU time the least, of the clock the median."""
        spent: list[list[float]] = [[] for _ in calls]
        clock, typical = (time.thread_time, min) if self._alone else (time.perf_counter, statistics.median)
        with _threads(1 if self._alone else torch.get_num_threads()):
            for _ in range(rounds):
                for call, times in zip(calls, spent, strict=True):
                    self._flush.add_(1)
                    start = clock()
                    call()
                    times.append(clock() - start)
        return [typical(times) for times in spent]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """torch on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
