"""How each kernel of ``kernels/*.h`` is launched: its name, grid, shared memory and arguments. Touches no GPU."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from sparsify.runtime.cuda.fragments import TILE_BYTES, tiles
from sparsify.runtime.cuda.integers import GRIDS, IntegerGrid


class Arguments(ctypes.Structure):
    """``Arguments`` of ``kernels/fragments.h``."""

    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in ("fragments", "x", "bias", "y", "partial")),
        *((name, ctypes.c_int) for name in ("tokens", "rows", "columns", "tiles", "splits", "early", "first", "count")),
        ("scales", ctypes.c_int),
    ]


@dataclass(frozen=True)
class Launch:
    """One launch: ``threads`` a block, ``shared`` bytes of dynamic shared memory.

    Attributes:
        cluster: blocks along z that run together and read each other's shared memory (compute capability 9.0).
        early: may start before the kernel before it on the stream has ended, which it waits for itself (9.0).
        resident: blocks that should find room on one multiprocessor; 0 leaves it to the driver.
    """

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    cluster: int = 1
    early: bool = False
    resident: int = 0


@dataclass(frozen=True)
class Variant:
    """How a product with fragments is cut up.

    Attributes:
        kind: ``decode`` (a block's warps split the columns), ``bulk`` (so too, with weights brought by the copy engine
            to blocks that stay for several groups of rows), ``tiled`` (the warps split the rows), ``wide`` (four
            warps split the rows and two the columns of a tile, with weights brought by the copy engine) or ``wgmma``
            (all warps but four, which copy inputs, split the rows; products of compute capability 9.0 alone); of
            integers ``int8g64`` and the like (:attr:`IntegerGrid.kind`), which cut it up as ``decode`` does.
        warps: of a block. row_tiles: of 16 rows, of a block (of a warp: ``tiled``, ``wide``, ``wgmma``). token_tiles:
            of 8 tokens, at most (of a block: ``tiled``, ``wide``, ``wgmma``).
        splits: blocks that share the columns of the same rows. They are a cluster and add their sums there; those of
            ``tiled`` leave them to a second kernel.
        early: see :class:`Launch`.
    """

    kind: str
    warps: int
    row_tiles: int
    token_tiles: int
    splits: int = 1
    early: bool = False

    @property
    def kernel(self) -> str:
        return f"{self.kind}_w{self.warps}_r{self.row_tiles}_m{self.token_tiles}"

    @property
    def name(self) -> str:
        return self.kernel + (f"_s{self.splits}" if self.splits > 1 else "") + ("_e" if self.early else "")

    @classmethod
    def named(cls, name: str) -> Variant:
        """Undo :attr:`name`.

        Raises:
            ValueError: no variant of that name is compiled.
        """
        parts = re.fullmatch(r"(\w+?)(?:_s(\d{1,2}))?(_e)?", name)
        base = next((v for v in VARIANTS if parts is not None and v.kernel == parts[1]), None)
        if parts is not None and base is not None:
            found = replace(base, splits=int(parts[2] or 1), early=parts[3] is not None)
            if found.name == name and found.splits in found.possible_splits:
                return found
        raise ValueError(f"no kernel {name!r}")

    @property
    def grid(self) -> IntegerGrid | None:
        """The integers that it multiplies with; None: weights of full width."""
        return _GRID_OF.get(self.kind)

    @property
    def possible_splits(self) -> Sequence[int]:
        match self.kind:
            case "tiled":
                return range(1, MOST_SPLITS + 1)
            case "wide" | "wgmma":
                return range(1, CLUSTERS[-1] + 1)
            case _:
                return CLUSTERS

    @property
    def needs_hopper(self) -> bool:
        """Whether compute capability 9.0 is the least that runs it."""
        return (
            self.kind in ("bulk", "wide", "wgmma")
            or self.early
            or (self.splits > 1 and self.kind in ("decode", *_GRID_OF))
        )

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether a GPU of ``capability`` has what it needs; the products of ``wgmma`` ended with 9.0."""
        return capability == HOPPER if self.kind == "wgmma" else capability >= HOPPER or not self.needs_hopper

    @property
    def most_tokens(self) -> int | None:
        """That it takes at once; None: any number."""
        return None if self.kind in MANY else 8 * self.token_tiles

    def fits(self, tokens: int, columns: int) -> bool:
        """Whether it takes ``tokens`` at once, and has columns enough to split."""
        return tokens <= (self.most_tokens or tokens) and self.splits <= tiles(1, columns)[1]

    def launch(self, tokens: int, rows: int, multiprocessors: int = 132) -> Launch:
        """For a GPU of so many ``multiprocessors``."""
        groups, threads = -(-rows // (16 * self.row_tiles)), 32 * self.warps
        # A round of the sums over warps: floats of 16 rows and 8 tokens.
        sums = self.warps * self.row_tiles * self.token_tiles * 512
        match self.kind:
            case kind if kind == "decode" or kind in _GRID_OF:
                return Launch(self.kernel, (groups, 1, self.splits), threads, sums, self.splits, self.early)
            case "bulk":
                depth, resident = _RINGS[self.warps, self.row_tiles]
                shared = self.warps * depth * (self.row_tiles * TILE_BYTES + _SIGNAL) + 2 * sums
                blocks = min(groups, max(1, multiprocessors * resident // self.splits))
                return Launch(self.kernel, (blocks, 1, self.splits), threads, shared, self.splits, self.early, resident)
            case "wide":
                high = -(-rows // (16 * self.row_tiles * _WIDE_ROWS))
                grid = (-(-tokens // (8 * self.token_tiles)), high, self.splits)
                stage = _WIDE_ROWS * self.row_tiles * TILE_BYTES + 8 * self.token_tiles * _WIDE_STAGE_ROW
                return Launch(self.kernel, grid, threads, 2 * (stage + _SIGNAL), self.splits, self.early, resident=1)
            case "wgmma":
                depth, places = _STAGES[self.warps, self.row_tiles, self.token_tiles]
                sum_warps = self.warps - _COPIERS
                high = -(-rows // (16 * self.row_tiles * sum_warps))
                grid = (-(-tokens // (8 * self.token_tiles)), high, self.splits)
                stages = places * (8 * self.token_tiles * _BLOCK_ROW + 2 * _SIGNAL)
                stages += sum_warps * depth * (self.row_tiles * TILE_BYTES + _SIGNAL)
                # Their sums take the same place.
                sums_wide = 4 * 8 * self.token_tiles * (16 * self.row_tiles * sum_warps + 4)
                shared = _BOUNDARY + max(stages, sums_wide)
                return Launch(self.kernel, grid, threads, shared, self.splits, self.early, resident=1)
            case _:
                high = -(-rows // (16 * self.row_tiles * self.warps))
                grid = (-(-tokens // (8 * self.token_tiles)), high, self.splits)
                return Launch(self.kernel, grid, threads, 2 * 8 * self.token_tiles * _STAGE_ROW, early=self.early)


# Bytes that kernels/tiled.h stages of a token.
_STAGE_ROW = 576
# The same of kernels/wide.h, and the warps of a block that take rows of their own.
_WIDE_STAGE_ROW, _WIDE_ROWS = 528, 4
# Bytes of a token that kernels/wgmma.h copies at once, the boundary that it lays them on, and its warps that copy.
_BLOCK_ROW, _BOUNDARY, _COPIERS = 128, 1024, 4
# Of kernels/device.h.
_SIGNAL = 8
# Tiles that a warp of a bulk kernel has on their way, and how many of its blocks share a multiprocessor, as
# kernels/kernels.cu compiles them: 150 to 170 KB on their way on each multiprocessor, some four times what the latency
# of the memory (about a microsecond at 4 TB/s) asks for, and as many blocks as 227 KB of shared memory hold.
_RINGS = {(8, 1): (2, 2), (4, 1): (3, 3), (8, 2): (2, 1)}
# Of each wgmma kernel (warps, row tiles, token tiles): tiles that each warp has on their way or in use, and places for
# 64 columns of inputs, as kernels/kernels.cu compiles them: 74 to 166 KB and 49 to 131 KB, of the 227 that a block may
# have.
_STAGES = {
    (12, 1, 8): (4, 8),
    (16, 1, 8): (3, 6),
    (12, 2, 8): (2, 8),
    (12, 1, 16): (3, 6),
    (16, 1, 16): (2, 6),
    (12, 2, 16): (2, 4),
    (12, 1, 32): (2, 4),
}
# Kinds that take any number of tokens.
MANY = ("tiled", "wide", "wgmma")
HOPPER = (9, 0)
# Of the columns, at most, by a second kernel; and by clusters, of which 8 is the most that every GPU with them runs.
MOST_SPLITS = 64
CLUSTERS = (1, 2, 4, 8)
# Those that kernels/kernels.cu compiles; the bulk and wide ones for compute capability 9.0 and later, the wgmma ones
# for 9.0 alone.
DECODE = tuple(Variant("decode", w, r, m) for w, r in ((8, 1), (4, 1), (16, 1), (8, 2)) for m in (1, 2))
BULK = tuple(Variant("bulk", w, r, m) for w, r in _RINGS for m in (1, 2))
TILED = tuple(Variant("tiled", w, r, m) for w, r in ((4, 1), (8, 1), (8, 2)) for m in (4, 8))
WIDE = tuple(Variant("wide", 8, r, m) for r in (2, 4) for m in (4, 8))
WGMMA = tuple(Variant("wgmma", w, r, m) for w, r, m in _STAGES)
INTEGERS = tuple(Variant(grid.kind, 8, 1, m) for grid in GRIDS for m in (1, 2))
VARIANTS = DECODE + BULK + TILED + WIDE + WGMMA + INTEGERS
_GRID_OF = {grid.kind: grid for grid in GRIDS}


def add_splits_launch(tokens: int, rows: int, early: bool = False) -> Launch:
    return Launch("add_splits", (-(-tokens * rows // 256), 1, 1), 256, 0, early=early)


def unpack_launch(count: int, columns: int, grid: IntegerGrid | None = None) -> Launch:
    """``count`` rows of ``columns``, of integers where there is a ``grid``."""
    high, wide = tiles(count, columns)
    return Launch("unpack" if grid is None else f"unpack_int{grid.bits}", (wide, high, 1), 32, 0)
