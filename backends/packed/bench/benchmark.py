"""What a benchmark of a packed folder measured."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from sparsify.backends.packed.labels import siblings_label
from sparsify.backends.packed.loaded.loading import Loading
from sparsify.backends.packed.loaded.on_gpu import Prepared
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

    @property
    def runs(self) -> str:
        """What runs them: a layout, or whose dense kernel."""
        return self.layout if self.layout != "dense" else f"dense, {self.kernel}"

    @property
    def seconds(self) -> float | None:
        """What that takes for one token; None where nothing was timed."""
        t = self.timing
        if t is None or t.packed is not None:
            return None if t is None else t.packed
        return t.torch if self.kernel == "torch" else t.dense


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

    @property
    def machine(self) -> str:
        return f"{self.processor}, {self.threads} threads" if self.device == "cpu" else self.processor

    def products_by_kind(self) -> dict[tuple[str, str], tuple[int, Prepared]]:
        """(layers, shape) -> how many there are, and one of them."""
        found: dict[tuple[str, str], tuple[int, Prepared]] = {}
        for product in self.products:
            key = siblings_label(product.names), "×".join(map(str, product.shape))
            found[key] = found.get(key, (0, product))[0] + 1, product
        return found

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
