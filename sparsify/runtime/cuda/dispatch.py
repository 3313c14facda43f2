"""Which kernel serves how many tokens: chosen from times where they were measured, by rules where they were not.

A plan is text, so that a graph can carry it: ``8:decode_w8_r1_m1,16:decode_w8_r1_m2,*:unpack`` runs the first kernel
for up to 8 tokens, the second up to 16, and multiplies with an unpacked copy above. Kernels are

- ``decode_…``, ``bulk_…``, ``tiled_…``, ``wide_…``, ``wgmma_…``: our own, on fragments
  (:class:`sparsify.runtime.cuda.variants.Variant`);
- ``int8g64_…``: our own, on fragments of integers (``g64``: a scale for 64 columns, ``g256``: for the row);
- ``unpack``: fragments to a dense copy that the next layer reuses, and cuBLAS;
- ``cusparselt:NUMBER``, ``cusparselt:NUMBER:SPLITS:MODE`` (:class:`sparsify.runtime.cuda.compressed.Algorithm`) and
  ``cutlass``: NVIDIA's, on the compressed copy.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

from sparsify.errors import BackendError
from sparsify.runtime.cuda.compressed import Algorithm
from sparsify.runtime.cuda.fragments import tiles
from sparsify.runtime.cuda.integers import IntegerGrid
from sparsify.runtime.cuda.variants import CLUSTERS, HOPPER, Variant
from sparsify.runtime.words import Policy

# Token counts that are measured; a count between two is served as the one above it.
BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
# A matrix stays dense where the best sparse kernel is slower than this share of the dense speed, at the token counts
# that its policy is for.
LEAST = 0.95
AIMS: dict[Policy, tuple[int, ...]] = {"decode": (1, 8), "prefill": (2048,), "both": (1, 8, 2048)}
DENSE = "dense"


@dataclass(frozen=True)
class Plan:
    """``kernels[i]`` serves more than ``limits[i - 1]`` and up to ``limits[i]`` tokens, the last one any more."""

    limits: tuple[int, ...]
    kernels: tuple[str, ...]

    def kernel(self, tokens: int) -> str:
        return self.kernels[bisect_left(self.limits, tokens)]

    def __str__(self) -> str:
        ends = [*map(str, self.limits), "*"]
        return ",".join(f"{end}:{kernel}" for end, kernel in zip(ends, self.kernels, strict=True))

    @staticmethod
    @lru_cache(maxsize=4096)
    def parse(text: str) -> Plan:
        """Undo ``str(plan)``.

        Raises:
            BackendError: no plan, or one that names a kernel that there is not.
        """
        parts = [part.partition(":")[::2] for part in text.split(",")]
        try:
            limits = tuple(int(end) for end, _ in parts[:-1])
            kernels = tuple(check_kernel(kernel) for _, kernel in parts)
            if parts[-1][0] != "*" or any(a >= b for a, b in pairwise((0, *limits))):
                raise ValueError("limits that do not ascend to *")
            for kernel, limit in zip(kernels, (*limits, 1 << 30), strict=True):
                if is_own(kernel) and limit > (Variant.named(kernel).most_tokens or limit):
                    raise ValueError(f"{kernel} for {limit} tokens")
        except ValueError as error:
            raise BackendError(f"the plan {text!r}", found=str(error), do="Prepare the weight again") from error
        return Plan(limits, kernels)

    @classmethod
    def of(cls, steps: Iterable[tuple[int, str]]) -> Plan:
        """From (up to, kernel) in ascending order; the last kernel serves all more. Equal neighbours become one."""
        limits: list[int] = []
        kernels: list[str] = []
        for limit, kernel in steps:
            if kernels and kernels[-1] == kernel:
                limits[-1] = limit
            else:
                limits.append(limit)
                kernels.append(kernel)
        return cls(tuple(limits[:-1]), tuple(kernels))


def is_own(kernel: str) -> bool:
    """Whether ``kernel`` is one of ours that multiplies with fragments."""
    return kernel.startswith(("decode", "bulk", "tiled", "wide", "wgmma", "int"))


def check_kernel(name: str) -> str:
    """``name``, if it is a kernel's.

    Raises:
        ValueError: it is none.
    """
    if name in ("unpack", "cutlass"):
        return name
    library, _, algorithm = name.partition(":")
    if library == "cusparselt":
        return f"{library}:{Algorithm.parse(algorithm)}"
    return Variant.named(name).name


@dataclass(frozen=True)
class Timings:
    """Microseconds of each kernel by token count, ``dense`` (cuBLAS) among them; empty where nothing was measured."""

    micro: Mapping[int, Mapping[str, float]]

    def best(self, tokens: int) -> tuple[str, float]:
        """The fastest sparse kernel at a measured count, and its time."""
        kernels = {k: t for k, t in self.micro[tokens].items() if k != DENSE}
        kernel = min(kernels, key=lambda k: kernels[k])
        return kernel, kernels[kernel]

    def gain(self, tokens: int) -> float:
        """Dense time by that of the fastest sparse kernel, at a measured count."""
        return self.micro[tokens][DENSE] / self.best(tokens)[1]

    def pays(self, policy: Policy) -> bool:
        """Whether the weight is worth keeping sparse for what ``policy`` is for; so where nothing was measured."""
        return not self.micro or any(self.gain(t) >= LEAST for t in AIMS[policy] if t in self.micro)

    def verdict(self, policy: Policy) -> str:
        """What was measured where ``policy`` aims: ``1 token: 0.80×, 8 tokens: 0.70× of the dense speed``."""
        aims = [t for t in AIMS[policy] if t in self.micro]
        parts = [f"{t} token{'s' if t > 1 else ''}: {self.gain(t):.2f}×" for t in aims]
        return f"{', '.join(parts)} of the dense speed"

    def plan(self) -> Plan:
        return Plan.of((tokens, self.best(tokens)[0]) for tokens in sorted(self.micro))


def default_plan(
    rows: int,
    columns: int,
    policy: Policy,
    library: str | None,
    multiprocessors: int = 132,
    capability: tuple[int, int] = (8, 0),
) -> Plan:
    """What is taken where nothing was measured.

    Args:
        library: of the compressed copy; None where there is none.
        multiprocessors, capability: of the GPU.
    """
    some = _wgmma if capability == HOPPER else _tiled
    many = f"{library}:0" if library == "cusparselt" else library
    if policy == "prefill" and many is not None:
        return Plan((), (many,))
    steps = [(8, "decode_w8_r1_m1"), (16, "decode_w8_r1_m2")]
    steps += [(tokens, some(rows, columns, tokens, multiprocessors)) for tokens in (32, 64, 128, 256)]
    return Plan.of([*steps, (1 << 30, many or "unpack")])


def integer_plan(grid: IntegerGrid) -> Plan:
    """The same of integers: a dense copy of a layer at a time serves more than sixteen tokens."""
    return Plan((8, 16), (f"{grid.kind}_w8_r1_m1", f"{grid.kind}_w8_r1_m2", "unpack"))


def _wgmma(rows: int, columns: int, tokens: int, multiprocessors: int) -> str:
    """Blocks of 192 rows, or of 256 where those would be more than the multiprocessors, and columns halved as often as
    there are multiprocessors for: what won, or nearly, on an H200 (docs/benchmarks.md).
    """
    groups = 8 if tokens <= 64 else 16
    across = -(-tokens // (8 * groups))
    tall = across * -(-rows // 192) > multiprocessors
    base = Variant("wgmma", 12, 2, groups) if tall else Variant("wgmma", 16, 1, groups)
    blocks = across * base.launch(tokens, rows).grid[1]
    some = [replace(base, splits=s) for s in CLUSTERS if s == 1 or s * blocks <= multiprocessors]
    return [v for v in some if v.fits(tokens, columns)][-1].name


def _tiled(rows: int, columns: int, tokens: int, multiprocessors: int) -> str:
    """Blocks of 256 rows, or of 64 where those would leave multiprocessors idle, and columns split until none is."""
    groups = 4 if tokens <= 32 else 8
    blocks = -(-tokens // (8 * groups)) * -(-rows // 256)
    warps, row_tiles = (8, 2) if blocks >= multiprocessors // 2 else (4, 1)
    blocks = -(-tokens // (8 * groups)) * -(-rows // (16 * warps * row_tiles))
    # Every split has two tiles of columns at least, for one to be on its way while the other is used.
    splits = max(1, min(multiprocessors // max(1, blocks), tiles(1, columns)[1] // 2, 16))
    return Variant("tiled", warps, row_tiles, groups, splits).name
