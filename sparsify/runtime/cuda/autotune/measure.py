"""The kernels that may serve one matrix, timed at every number of tokens."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from sparsify.errors import BackendError, first_line
from sparsify.runtime.cuda import compressed
from sparsify.runtime.cuda.autotune.clock import Clock
from sparsify.runtime.cuda.dispatch import BUCKETS, DENSE, Timings
from sparsify.runtime.cuda.fragments import tiles
from sparsify.runtime.cuda.variants import DECODE, TILED, Variant

_SPLITS = (1, 2, 4, 8)


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
def measure(matrix: RacedMatrix, call: MakeCall, clock: Clock, buckets: Sequence[int] = BUCKETS) -> Timings:
    """Time every kernel that ``matrix`` allows at each of ``buckets``. One that fails is left out, with a warning.

    Args:
        call: makes the call that runs a kernel: :func:`sparsify.runtime.cuda.autotune.times.call_of`.
    """
    columns = matrix.dense.shape[1]
    held = [matrix]
    found: dict[int, dict[str, float]] = {}
    for tokens in buckets:
        # Where arithmetic bounds the product a cache matters little, and copies would take the time.
        wanted = clock.copies(min(matrix.layouts), sum(matrix.layouts)) if tokens <= 256 else 2
        held = held[:wanted] + [matrix.copy() for _ in range(wanted - len(held))]
        x = torch.randn(tokens, columns, device=matrix.dense.device).to(matrix.dense.dtype)
        times = _times(held, x, call, clock)
        if len(times) > 1:
            found[tokens] = times
    return Timings(found)


def _times(held: Sequence[RacedMatrix], x: Tensor, call: MakeCall, clock: Clock) -> dict[str, float]:
    (rows, columns), tokens = held[0].dense.shape, x.shape[0]
    calls: dict[str, list[Callable[[], object]]] = {DENSE: [partial(linear, x, w.dense) for w in held]}
    for kernel in candidates(tokens, rows, columns, held[0], x):
        calls[kernel] = [partial(call(kernel, w), x) for w in held]
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


def candidates(tokens: int, rows: int, columns: int, matrix: RacedMatrix, x: Tensor) -> list[str]:
    """The kernels that may be fastest for ``tokens``."""
    names: list[str] = []
    if matrix.fragments is not None:
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
    if matrix.compressed is not None and matrix.codes is not None:
        names.append("cutlass")
    elif matrix.compressed is not None:
        try:
            names.append(f"cusparselt:{_algorithm(matrix.compressed, x)}")
        except RuntimeError as error:
            _left_out("cusparselt", x, rows, error)
    return names


def _algorithm(weight: Tensor, x: Tensor) -> int:
    padded = pad(x, (0, 0, 0, -x.shape[0] % compressed.TOKEN_UNIT))
    return compressed.search(weight, padded)
