"""How long a call takes on a GPU.

Weights come from memory and not from the L2 cache, as between two uses of one matrix in a model: calls go over copies
that together exceed it. They are replayed from a CUDA graph, so that no launch is waited for.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

# How much more than the L2 cache the copies take together.
_TIMES_CACHE = 4
_REPLAYS = 15


class Clock(Protocol):
    """Measures calls."""

    def copies(self, read: int, held: int) -> int:
        """How many copies of a weight keep it out of the cache: a call reads ``read`` bytes of ``held`` in all."""
        ...

    def seconds(self, calls: Sequence[Callable[[], object]]) -> float:
        """Of one call, all of ``calls`` done one after the other; the median of several rounds."""
        ...


@dataclass(frozen=True)
class GPUClock:
    device: torch.device

    def copies(self, read: int, held: int) -> int:
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        free = torch.cuda.mem_get_info(self.device)[0]
        # A model may be there already, and is not to be pushed out.
        return max(1, min(-(-_TIMES_CACHE * cache // read), free // 2 // held, 256))

    def seconds(self, calls: Sequence[Callable[[], object]]) -> float:
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for call in calls:
                    call()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                for call in calls:
                    call()
            graph.replay()
            spent = []
            for _ in range(_REPLAYS):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                graph.replay()
                end.record()
                end.synchronize()
                spent.append(start.elapsed_time(end) / 1e3 / len(calls))
            return statistics.median(spent)
