"""The kernels that may serve one matrix, timed at every number of tokens."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from sparsify.errors import BackendError, first_line
from sparsify.runtime.cuda import compressed
from sparsify.runtime.cuda.autotune.clock import Clock
from sparsify.runtime.cuda.dispatch import BUCKETS, DENSE, Timings
from sparsify.runtime.cuda.fragments import tiles
from sparsify.runtime.cuda.gpu import GPU
from sparsify.runtime.cuda.integers import IntegerGrid, grid_in
from sparsify.runtime.cuda.variants import BULK, CLUSTERS, DECODE, INTEGERS, TILED, WGMMA, WIDE, Variant

_SPLITS = (1, 2, 4, 8)
# Shares of the multiprocessors that have work, on average over the rounds of blocks: most of them, and nearly all.
_BUSY = (0.6, 0.85)
# How often the fastest is timed again.
_AGAIN = 3


@dataclass(frozen=True)
class RacedMatrix:
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

    def copy(self) -> RacedMatrix:
        return RacedMatrix(self.dense.clone(), _cloned(self.fragments), _cloned(self.compressed), _cloned(self.codes))


def _cloned(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


# (kernel's name, matrix) -> (x -> y)
MakeCall = Callable[[str, RacedMatrix], Callable[[Tensor], object]]


@torch.inference_mode()
def measure(matrix: RacedMatrix, call: MakeCall, clock: Clock, gpu: GPU, buckets: Sequence[int] = BUCKETS) -> Timings:
    """Time every kernel that ``matrix`` and ``gpu`` allow at each of ``buckets``. One that fails is left out, with a
    warning.

    Args:
        call: makes the call that runs a kernel: :func:`sparsify.runtime.cuda.autotune.times.call_of`.
    """
    columns = matrix.dense.shape[1]
    held = [matrix]
    found: dict[int, dict[str, float]] = {}
    for tokens in buckets:
        # Where arithmetic bounds the product a cache matters little, and copies would take the time.
        wanted = clock.copies(min(matrix.layouts), sum(matrix.layouts))
        if tokens > 256:
            wanted = max(2, min(4, wanted))
        held = held[:wanted] + [matrix.copy() for _ in range(wanted - len(held))]
        x = torch.randn(tokens, columns, device=matrix.dense.device).to(matrix.dense.dtype)
        times = _times(held, x, call, clock, gpu)
        if len(times) > 1:
            found[tokens] = times
    return Timings(found)


def _times(held: Sequence[RacedMatrix], x: Tensor, call: MakeCall, clock: Clock, gpu: GPU) -> dict[str, float]:
    rows = held[0].dense.shape[0]
    calls: dict[str, list[Callable[[], object]]] = {DENSE: [partial(linear, x, w.dense) for w in held]}
    for kernel in candidates(held[0], x, gpu):
        calls[kernel] = [partial(call(kernel, w), x) for w in held]
    found = {}
    for kernel, run in calls.items():
        try:
            found[kernel] = round(clock.seconds(run) * 1e6, 3)
        except (RuntimeError, BackendError) as error:
            if kernel == DENSE:
                raise
            _left_out(kernel, x, rows, error)
    # The least of many is the luckiest of them too: whichever leads is timed again, in turns with the dense product,
    # until one leads that was.
    again: dict[str, list[float]] = {DENSE: []}
    while len(found) > 1 and (best := min((k for k in found if k != DENSE), key=lambda k: found[k])) not in again:
        again[best] = []
        for kernel in (DENSE, best) * _AGAIN:
            again[kernel].append(clock.seconds(calls[kernel]))
        for kernel in (DENSE, best):
            found[kernel] = round(statistics.median(again[kernel]) * 1e6, 3)
    return found


def _left_out(kernel: str, x: Tensor, rows: int, error: Exception) -> None:
    where = f"{x.shape[0]} tokens of {rows}×{x.shape[1]}"
    warnings.warn(f"sparsify: {kernel} is left out for {where}: {first_line(error)}", RuntimeWarning, stacklevel=4)


def candidates(matrix: RacedMatrix, x: Tensor, gpu: GPU) -> list[str]:
    """The kernels that may be fastest for ``x`` on ``gpu``."""
    (tokens, columns), rows = x.shape, matrix.dense.shape[0]
    names: list[str] = []
    if matrix.fragments is not None:
        names = [v.name for v in own_candidates(tokens, rows, columns, gpu, grid_in(matrix.fragments))]
        if tokens > 16:
            names.append("unpack")
    if matrix.compressed is not None and matrix.codes is not None:
        names.append("cutlass")
    elif matrix.compressed is not None:
        try:
            found = _algorithm(matrix.compressed, x)
            # Its search looks at one kernel alone, with everything in the cache: without splits it may do better.
            names += dict.fromkeys((f"cusparselt:{found}", f"cusparselt:{found.number}"))
        except RuntimeError as error:
            _left_out("cusparselt", x, rows, error)
    return names


def own_candidates(tokens: int, rows: int, columns: int, gpu: GPU, grid: IntegerGrid | None = None) -> list[Variant]:
    """Of our own kernels, for integers where there is a ``grid``. Each is raced started early, too, where the GPU
    can.
    """
    if tokens > (512 if grid is None else 16):
        return []
    if tokens > 16:
        groups = 4 if tokens <= 32 else 8
        found = [replace(v, splits=s) for v in TILED if v.token_tiles == groups for s in _SPLITS]
        # Two tiles of columns a split at least, for one to be on its way while the other is used.
        found = [v for v in found if v.splits <= max(1, tiles(1, columns)[1] // 2)]
        wide = [replace(v, splits=s) for v in WIDE if v.token_tiles == groups for s in v.possible_splits]
        found += [v for v in wide if v.fits(tokens, columns)]
        found += _wgmma(tokens, rows, columns, gpu)
    else:
        kernels = DECODE + BULK if grid is None else tuple(v for v in INTEGERS if v.grid == grid)
        some = [v for v in kernels if 8 * (v.token_tiles - 1) < tokens]
        # Columns are split over more blocks where there are too few rows to occupy the GPU.
        blocks = 2 * gpu.multiprocessors
        found = [
            replace(v, splits=s) for v in some for s in CLUSTERS if s == 1 or s * rows <= 16 * v.row_tiles * blocks
        ]
        found = [v for v in found if v.fits(tokens, columns)]
    found += [replace(v, early=True) for v in found]
    return [v for v in found if v.runs_on(gpu.capability)]


def _wgmma(tokens: int, rows: int, columns: int, gpu: GPU) -> list[Variant]:
    """Of blocks that hold about as many tokens as there are. Each fills a multiprocessor, and the last round of them is
    rarely full: columns are split as little as keeps most of the GPU busy, and in the first two ways that keep nearly
    all of it so.
    """
    enough = next((m for m in (8, 16) if tokens <= 8 * m), 32)
    found: list[Variant] = []
    for variant in WGMMA:
        if variant.token_tiles != enough and not (variant.token_tiles == 16 and tokens > 128):
            continue
        across, high, _ = variant.launch(tokens, rows).grid
        split = [v for s in variant.possible_splits if (v := replace(variant, splits=s)).fits(tokens, columns)]
        rounds = {v: across * high * v.splits / gpu.multiprocessors for v in split}
        busy = {v: rounds[v] / math.ceil(rounds[v]) for v in split}
        some = [v for v in split if busy[v] >= _BUSY[0]][:1] + [v for v in split if busy[v] >= _BUSY[1]][:2]
        found += dict.fromkeys(some or split[-1:])
    return found


def _algorithm(weight: Tensor, x: Tensor) -> compressed.Algorithm:
    padded = pad(x, (0, 0, 0, -x.shape[0] % compressed.TOKEN_UNIT))
    return compressed.search(weight, padded)
