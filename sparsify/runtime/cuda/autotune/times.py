"""What every kernel takes on a GPU, by the shape of the matrix: measured once, then read from a file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.runtime.cache import cache_folder, put_whole, read_object
from sparsify.runtime.codes import pack_nibbles
from sparsify.runtime.cuda import compressed as libraries
from sparsify.runtime.cuda import nvrtc
from sparsify.runtime.cuda.autotune.clock import Clock, GPUClock
from sparsify.runtime.cuda.autotune.measure import MakeCall, RacedMatrix, measure
from sparsify.runtime.cuda.compressed import SparseLibrary
from sparsify.runtime.cuda.dispatch import BUCKETS, DENSE, Timings, check_kernel
from sparsify.runtime.cuda.gpu import GPU
from sparsify.runtime.cuda.integers import IntegerGrid, pack_fragments
from sparsify.runtime.cuda.products import run_kernel
from sparsify.runtime.few_bits import groups
from sparsify.runtime.layout import Packed, padded, unpack
from sparsify.runtime.words import Policy


@dataclass(frozen=True)
class TimesFile:
    """Timings by shape in one file per GPU name, torch, library version and kernel source."""

    path: Path

    @classmethod
    def of(cls, device: torch.device) -> TimesFile:
        name = re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name(device)).strip("-")
        library = getattr(torch.backends, "cusparselt", None)
        version = library.version() if library is not None and library.is_available() else None
        torch_version = re.sub(r"[^A-Za-z0-9.]+", "-", torch.__version__)
        return cls(
            cache_folder() / f"times-{name}-torch{torch_version}-cusparselt{version or 0}-{nvrtc.source_hash()}.json"
        )

    def get(self, key: str) -> Timings | None:
        """What was measured under ``key``; None where nothing was, or the file is not of ours."""
        entry = read_object(self.path).get(key)
        try:
            return None if entry is None else Timings({int(tokens): _checked(times) for tokens, times in entry.items()})
        except (AttributeError, TypeError, ValueError):
            return None

    def put(self, key: str, timings: Timings) -> None:
        content = read_object(self.path) | {key: {str(t): dict(times) for t, times in timings.micro.items()}}
        put_whole(self.path, json.dumps(content, indent=1).encode())


def _checked(times: Mapping[str, Any]) -> dict[str, float]:
    return {name if name == DENSE else check_kernel(name): float(micro) for name, micro in times.items()}


@cache
def timings_of(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    policy: Policy,
    library: SparseLibrary | None,
    device: torch.device,
    grid: IntegerGrid | None = None,
) -> Timings:
    """What every kernel that ``policy`` allows takes on ``device``: from the cache folder, or measured now."""
    store = TimesFile.of(device)
    key = f"{rows}x{columns}:{str(dtype).removeprefix('torch.')}:{policy}:{library or 'none'}"
    key += "" if grid is None else f":{grid.kind}"
    found = store.get(key)
    if found is None:
        found = race(rows, columns, dtype, policy, library, device, GPUClock(device), GPU.of(device), grid=grid)
        store.put(key, found)
    return found


def call_of(kernel: str, matrix: RacedMatrix) -> Callable[[Tensor], Tensor]:
    """The call that runs ``kernel`` on ``matrix``."""
    rows = matrix.dense.shape[0]
    return lambda x: run_kernel(kernel, x, matrix.fragments, matrix.compressed, matrix.codes, rows)


def race(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    policy: Policy,
    library: SparseLibrary | None,
    device: torch.device,
    clock: Clock,
    gpu: GPU,
    buckets: Sequence[int] = BUCKETS,
    call: MakeCall = call_of,
    grid: IntegerGrid | None = None,
) -> Timings:
    """Time the kernels of ``gpu`` on a random 2:4 matrix, of integers where there is a ``grid``, on ``device``."""
    packed = random_24(rows, columns, dtype, device, grid)
    held, codes = libraries.compress(packed, library) if library is not None else (None, None)
    fragments = pack_fragments(packed) if policy != "prefill" else None
    return measure(RacedMatrix(unpack(packed), fragments, held, codes), call, clock, gpu, buckets)


def random_24(
    rows: int, columns: int, dtype: torch.dtype, device: torch.device, grid: IntegerGrid | None = None
) -> Packed:
    """A random matrix with two values of every four, of integers where there is a ``grid``."""
    generator = torch.Generator(device).manual_seed(0)
    full = padded(columns, None if grid is None else grid.bits)
    # The six ways to choose two positions of four.
    nibbles = torch.tensor([4, 8, 9, 12, 13, 14], dtype=torch.uint8, device=device)
    chosen = nibbles[torch.randint(6, (rows, full // 4), generator=generator, device=device)]
    codes = chosen[:, ::2] | chosen[:, 1::2] << 4
    # A group that is cut off by the edge, and those beyond it, stay empty.
    kept = columns // 4 * 2
    if grid is None:
        values = torch.randn(rows, full // 2, generator=generator, device=device).to(dtype)
        values[:, kept:] = 0
        return Packed("packed24", (rows, columns), values, codes)
    most = 1 << (grid.bits - 1)
    integers = torch.randint(-most, most, (rows, full // 2), generator=generator, device=device).to(torch.int8)
    integers[:, kept:] = 0
    scales = torch.randn(rows, groups(columns, grid.group), generator=generator, device=device).to(dtype) / most
    held = integers if grid.bits == 8 else pack_nibbles(integers)
    return Packed("packed24", (rows, columns), held, codes, scales, grid.bits, grid.group)
