"""How long a call takes on a GPU.

Weights come from memory and not from the L2 cache, as between two uses of one matrix in a model: calls go over copies
that together exceed it. They are replayed from a CUDA graph, so that no launch is waited for.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch

# How much more than the L2 cache the copies take together.
_TIMES_CACHE = 4
_REPLAYS = 15
# Calls of one replay, at least.
_CALLS = 16


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
        # Left as it was also where a capture fails, which leaves its own stream behind.
        with torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.current_stream(self.device)):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for call in calls:
                    call()
            torch.cuda.synchronize()
            graph, many = torch.cuda.CUDAGraph(), [*calls] * -(-_CALLS // len(calls))
            with torch.cuda.graph(graph, stream=stream):
                for call in many:
                    call()
            events = [torch.cuda.Event(enable_timing=True) for _ in range(_REPLAYS + 1)]
            # One replay is queued while another runs, so that no gap between two is counted: the first ones keep the
            # GPU busy meanwhile.
            graph.replay()
            graph.replay()
            events[0].record()
            for event in events[1:]:
                graph.replay()
                event.record()
            events[-1].synchronize()
            return statistics.median(one.elapsed_time(other) / 1e3 / len(many) for one, other in pairwise(events))
