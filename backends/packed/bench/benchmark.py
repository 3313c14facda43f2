"""What a benchmark of a packed folder measured."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from sparsify.backends.packed.loaded.loading import Loading
from sparsify.backends.packed.loaded.prepare import Prepared
from sparsify.runtime.stopwatch import Timing


@dataclass(frozen=True)
class Speed:
    """Tokens a second of the dense and the packed model, medians of rounds, and the median of the rounds' ratios."""

    dense: float
    packed: float
    ratio: float
    low: float
    high: float

    @classmethod
    def of(cls, tokens: int, seconds: list[tuple[float, float]]) -> Speed:
        """From (dense, packed) seconds of each round."""
        ratios = [d / p for d, p in seconds]
        dense, packed = (statistics.median(tokens / pair[i] for pair in seconds) for i in (0, 1))
        return cls(dense, packed, statistics.median(ratios), min(ratios), max(ratios))


@dataclass(frozen=True)
class SiteSpeed:
    """Linear layers of one kind and shape: what runs them, and what one token through one of them takes."""

    kind: str
    count: int
    shape: tuple[int, ...]
    layout: str
    kernel: str
    timing: Timing | None


@dataclass(frozen=True)
class Benchmark:
    """What was measured.

    Attributes:
        against: the dense model's name, or says that the folder itself was unpacked.
        device: ``cpu``, or a GPU; ``processor`` is its name. ``threads``: of a CPU.
        memory: bytes of all weights on the device, dense and packed.
        sites: layers on a CPU. products: on a GPU, what its kernels were measured to gain (empty with ``tune=False``).
    """

    folder: str
    against: str
    processor: str
    threads: int
    dtype: str
    prompt: int
    tokens: int
    rounds: int
    prefill: Speed
    decode: Speed | None
    same_tokens: bool | None
    file_bytes: tuple[int, int]
    loading: tuple[Loading, Loading] | None
    sites: list[SiteSpeed]
    device: str = "cpu"
    memory: tuple[int, int] | None = None
    products: list[Prepared] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
