"""Measure whether packing pays: one token through a matrix, packed and dense, as token by token generation does it.

Weights come from memory, not from a cache: what a large model does between two uses of one matrix is imitated by
reading a buffer larger than the caches before every call.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparsify.runtime.ops import linear_dense
from sparsify.runtime.packed_weight import PackedWeight

# A matrix stays dense where packing it would make a token slower than this share of the dense speed.
LEAST = 0.95
_ROUNDS = 7
_FLUSH = 64 << 20


@dataclass(frozen=True)
class Timing:
    """Seconds that one token takes: through ``F.linear``, through our dense kernel, and packed (None: not measured)."""

    torch: float
    dense: float
    packed: float | None
    threads: int

    @property
    def best_dense(self) -> float:
        return min(self.torch, self.dense)

    @property
    def pays(self) -> bool:
        """Whether the packed product is not slower than the best dense one by more than LEAST allows."""
        return self.ratio * LEAST <= 1

    @property
    def ratio(self) -> float:
        """The packed time by that of the best dense product."""
        return math.inf if self.packed is None else self.packed / self.best_dense

    def as_dict(self) -> dict[str, float | int | None]:
        def micro(seconds: float | None) -> float | None:
            return None if seconds is None else round(seconds * 1e6, 2)

        return {
            "torch_us": micro(self.torch),
            "dense_us": micro(self.dense),
            "packed_us": micro(self.packed),
            "threads": self.threads,
        }


class Stopwatch:
    """Times each distinct shape, dtype, layout, tenth of zeros and number of threads once, and remembers it.

    Args:
        flush: read a buffer larger than the caches before every call, so that weights come from memory.
    """

    def __init__(self, *, flush: bool = True) -> None:
        self._known: dict[tuple[object, ...], Timing] = {}
        self._flush = torch.zeros(_FLUSH // 4 if flush else 1)

    def packed(self, weight: Tensor, packed: PackedWeight) -> Timing:
        """Time ``weight`` [out_features, in_features] against itself packed."""
        tenths = round(10 * packed.packed.values.numel() / max(1, weight.numel()))
        key = (packed.packed.layout, *weight.shape, weight.dtype, tenths, torch.get_num_threads())
        if key not in self._known:
            self._known[key] = self._time(weight, packed.linear)
        return self._known[key]

    def dense(self, weight: Tensor) -> Timing:
        """Time a weight that is not packed: whether our kernel serves it better than torch's."""
        key = ("dense", *weight.shape, weight.dtype, torch.get_num_threads())
        if key not in self._known:
            self._known[key] = self._time(weight, None)
        return self._known[key]

    def _time(self, weight: Tensor, product: Callable[[Tensor], Tensor] | None) -> Timing:
        x = torch.randn(1, weight.shape[1]).to(weight.dtype)
        weight = weight.contiguous()
        calls: list[Callable[[], object]] = [lambda: linear(x, weight), lambda: linear_dense(x, weight)]
        if product is not None:
            calls.append(lambda: product(x))
        spent = self.race(calls)
        return Timing(spent[0], spent[1], spent[2] if product is not None else None, torch.get_num_threads())

    @torch.inference_mode()
    def race(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        """Seconds of each of ``calls``, taken in turns: medians."""
        spent: list[list[float]] = [[] for _ in calls]
        for _ in range(_ROUNDS):
            for call, times in zip(calls, spent, strict=True):
                self._flush.add_(1)
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
        return [statistics.median(times) for times in spent]
