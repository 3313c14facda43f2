"""What a benchmark of one folder against another measured."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from sparsify.backends.bench.loading import Loading
from sparsify.backends.packed.labels import siblings_label
from sparsify.backends.packed.loaded.on_gpu import Prepared
from sparsify.errors import Refused
from sparsify.runtime.cpu.stopwatch import Timing
from sparsify.words import apart


@dataclass(frozen=True)
class Speed:
    """Tokens a second of both models, medians of rounds; and of the rounds' ratios, ``out`` to ``against``, the median
    (``ratio``), the least and the greatest.
    """

    against: float
    out: float
    ratio: float
    low: float
    high: float

    @classmethod
    def of(cls, tokens: int, seconds: list[tuple[float, float]]) -> Speed:
        """From seconds of (against, out) in each round."""
        ratios = [one / other for one, other in seconds]
        against, out = (statistics.median(tokens / pair[i] for pair in seconds) for i in (0, 1))
        return cls(against, out, statistics.median(ratios), min(ratios), max(ratios))


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
        return self.layout if self.kernel == "packed" else f"dense, {self.kernel}"

    @property
    def seconds(self) -> float | None:
        """What that takes for one token; None where nothing was timed."""
        t = self.timing
        if t is None or t.packed is not None:
            return None if t is None else t.packed
        return t.torch if self.kernel == "torch" else t.dense


@dataclass(frozen=True)
class PeerSpeed:
    """The folder against another runtime's form of the same model; of each pair the first is that runtime's.

    Attributes:
        name: of runtime and form (``llama.cpp Q8_0``). version: of its package. nbytes: of its file.
        prefill, decode: tokens a second by the clock; ``_cpu``: a second of processor time, of all threads.
    """

    name: str
    version: str
    nbytes: int
    prefill: Speed
    prefill_cpu: Speed
    decode: Speed
    decode_cpu: Speed


@dataclass(frozen=True)
class Benchmark:
    """What was measured. Of pairs the first is of the model that the folder is measured against.

    Attributes:
        against: that model's name, or says that the folder itself was unpacked.
        kinds, dtypes: what both are (``packed``, ``checkpoint``, ``ragged``, ``ONNX``), and of which dtype.
        device: ``cpu``, or a GPU; ``processor`` is its name. ``threads``: of a CPU.
        prompt: its tokens; None of a model of pictures, of which ``prefill`` is one pass over one.
        prefill: None where a graph takes one token at a time.
        memory: bytes of all weights on the device; None where one lies in onnxruntime.
        sites: layers of a packed folder on a CPU. products: on a GPU, what its kernels were measured to gain (empty
            with ``tune=False``).
        peers: other runtimes on the model that it is measured against; ``no_peers``: what could not hold it, and why.
    """

    folder: str
    against: str
    kinds: tuple[str, str]
    processor: str
    threads: int
    dtypes: tuple[str, str]
    prompt: int | None
    tokens: int
    rounds: int
    prefill: Speed | None
    decode: Speed | None
    same_tokens: bool | None
    file_bytes: tuple[int, int]
    loading: tuple[Loading, Loading] | None
    sites: list[SiteSpeed]
    device: str = "cpu"
    memory: tuple[int, int] | None = None
    products: list[Prepared] = field(default_factory=list)
    peers: list[PeerSpeed] = field(default_factory=list)
    no_peers: list[Refused] = field(default_factory=list)

    @property
    def machine(self) -> str:
        return f"{self.processor}, {self.threads} threads" if self.device == "cpu" else self.processor

    @property
    def dtype(self) -> str:
        """Of both, or ``bfloat16 and float32``: of the other model's, then of the folder's own."""
        return " and ".join(dict.fromkeys(self.dtypes))

    @property
    def columns(self) -> tuple[str, str]:
        """What tells the two models apart in a table: their kinds, or where these are the same, their names."""
        against, out = ("dense" if kind == "unpacked" else kind for kind in self.kinds)
        if against == out:
            against, out = apart([self.against, self.folder])
        return against, out

    def products_by_kind(self) -> dict[tuple[str, str], tuple[int, Prepared]]:
        """(layers, shape) -> how many there are, and one of them."""
        found: dict[tuple[str, str], tuple[int, Prepared]] = {}
        for product in self.products:
            key = siblings_label(product.names), "×".join(map(str, product.shape))
            found[key] = found.get(key, (0, product))[0] + 1, product
        return found

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
