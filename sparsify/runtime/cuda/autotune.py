"""Measure every kernel on one shape, on the GPU at hand, and keep what was measured.

Weights come from memory and not from the L2 cache, as between two uses of one matrix in a model: calls go over copies
that together exceed it. They are replayed from a CUDA graph, so that no launch is waited for.
"""

from __future__ import annotations

import json
import re
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparsify.errors import BackendError, first_line
from sparsify.runtime.cache import cache_folder, put_whole
from sparsify.runtime.cuda import compressed, nvrtc
from sparsify.runtime.cuda.dispatch import BUCKETS, DENSE, Timings, check_kernel
from sparsify.runtime.cuda.fragments import tiles
from sparsify.runtime.cuda.variants import DECODE, TILED, Variant

# How much more than the L2 cache the copies take together.
_TIMES_CACHE = 4
_REPLAYS = 15
_SPLITS = (1, 2, 4, 8)


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


# (kernel's name, weight) -> (x -> y)
Product = Callable[[str, "Weights"], Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class Weights:
    """One matrix in each layout that is raced; None for those that are not."""

    dense: Tensor
    fragments: Tensor | None
    compressed: Tensor | None
    codes: Tensor | None

    @property
    def layouts(self) -> list[int]:
        """Bytes of each."""
        both = [t for t in (self.compressed, self.codes) if t is not None]
        sizes = [self.dense.nbytes, 0 if self.fragments is None else self.fragments.nbytes, sum(t.nbytes for t in both)]
        return [size for size in sizes if size]

    def copy(self) -> Weights:
        return Weights(*(None if t is None else t.clone() for t in vars(self).values()))  # type: ignore[arg-type]


@torch.inference_mode()
def measure(weights: Weights, product: Product, clock: Clock, buckets: Sequence[int] = BUCKETS) -> Timings:
    """Time every kernel that ``weights`` allow at each of ``buckets``. One that fails is left out, with a warning.

    Args:
        product: makes the call that runs a kernel: :func:`sparsify.runtime.cuda.ops.product`.
    """
    columns = weights.dense.shape[1]
    held = [weights]
    found: dict[int, dict[str, float]] = {}
    for tokens in buckets:
        # Where arithmetic bounds the product a cache matters little, and copies would take the time.
        wanted = clock.copies(min(weights.layouts), sum(weights.layouts)) if tokens <= 256 else 2
        held = held[:wanted] + [weights.copy() for _ in range(wanted - len(held))]
        x = torch.randn(tokens, columns, device=weights.dense.device).to(weights.dense.dtype)
        times = _times(held, x, product, clock)
        if len(times) > 1:
            found[tokens] = times
    return Timings(found)


def _times(held: Sequence[Weights], x: Tensor, product: Product, clock: Clock) -> dict[str, float]:
    (rows, columns), tokens = held[0].dense.shape, x.shape[0]
    calls: dict[str, list[Callable[[], object]]] = {DENSE: [partial(linear, x, w.dense) for w in held]}
    for kernel in candidates(tokens, rows, columns, held[0], x):
        calls[kernel] = [partial(product(kernel, w), x) for w in held]
    found = {}
    for kernel, run in calls.items():
        try:
            found[kernel] = round(clock.seconds(run) * 1e6, 3)
        except (RuntimeError, BackendError) as error:
            if kernel == DENSE:
                raise
            _left_out(kernel, x, rows, error)
    return found


def _left_out(kernel: str, x: Tensor, rows: int, error: Exception) -> None:
    where = f"{x.shape[0]} tokens of {rows}×{x.shape[1]}"
    warnings.warn(f"sparsify: {kernel} is left out for {where}: {first_line(error)}", RuntimeWarning, stacklevel=4)


def candidates(tokens: int, rows: int, columns: int, weights: Weights, x: Tensor) -> list[str]:
    """The kernels that may be fastest for ``tokens``."""
    names: list[str] = []
    if weights.fragments is not None:
        own: list[Variant] = []
        if tokens <= 16:
            own = [v for v in DECODE if v.fits(tokens, columns) and 8 * (v.token_tiles - 1) < tokens]
        elif tokens <= 512:
            groups = 4 if tokens <= 32 else 8
            some = [v for v in TILED if v.token_tiles == groups]
            own = [Variant(v.kind, v.warps, v.row_tiles, v.token_tiles, s) for v in some for s in _SPLITS]
            own = [v for v in own if v.splits <= max(1, tiles(1, columns)[1] // 2)]
        names += [v.name for v in own]
        if tokens > 16:
            names.append("unpack")
    if weights.compressed is not None and weights.codes is not None:
        names.append("cutlass")
    elif weights.compressed is not None:
        try:
            names.append(f"cusparselt:{_algorithm(weights.compressed, x)}")
        except RuntimeError as error:
            _left_out("cusparselt", x, rows, error)
    return names


def _algorithm(weight: Tensor, x: Tensor) -> int:
    padded = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[0] % compressed.TOKEN_UNIT))
    return compressed.search(weight, padded)


@dataclass(frozen=True)
class Cache:
    """Timings by shape in one file per GPU name, torch, library version and kernel source."""

    path: Path

    @classmethod
    def of(cls, device: torch.device) -> Cache:
        name = re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name(device)).strip("-")
        library = getattr(torch.backends, "cusparselt", None)
        version = library.version() if library is not None and library.is_available() else None
        torch_version = re.sub(r"[^A-Za-z0-9.]+", "-", torch.__version__)
        return cls(
            cache_folder() / f"times-{name}-torch{torch_version}-cusparselt{version or 0}-{nvrtc.source_hash()}.json"
        )

    def get(self, key: str) -> Timings | None:
        """What was measured under ``key``; None where nothing was, or the file is not of ours."""
        entry = self._read().get(key)
        try:
            return None if entry is None else Timings(
                {int(t): {k if k == DENSE else check_kernel(k): float(s) for k, s in times.items()}
                 for t, times in entry.items()}
            )  # fmt: skip
        except (AttributeError, TypeError, ValueError):
            return None

    def put(self, key: str, timings: Timings) -> None:
        content = self._read() | {key: {str(t): dict(times) for t, times in timings.micro.items()}}
        put_whole(self.path, json.dumps(content, indent=1).encode())

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}
