"""How each kernel of ``kernels/*.h`` is launched: its name, grid, shared memory and arguments. Touches no GPU."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from typing import ClassVar

from sparsify.runtime.cuda.fragments import tiles


class Arguments(ctypes.Structure):
    """``Arguments`` of ``kernels/fragments.h``."""

    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in ("fragments", "x", "bias", "y", "partial")),
        *((name, ctypes.c_int) for name in ("tokens", "rows", "columns", "tiles", "splits", "first", "count")),
    ]


@dataclass(frozen=True)
class Launch:
    """One launch: ``threads`` a block, ``shared`` bytes of dynamic shared memory."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int


@dataclass(frozen=True)
class Variant:
    """How a product with fragments is cut up.

    Attributes:
        kind: ``decode`` (a block's warps split the columns) or ``tiled`` (they split the rows).
        warps: of a block. row_tiles: of 16 rows, of a block (decode) or a warp (tiled). token_tiles: of 8 tokens, at
            most (decode) or of a block (tiled).
        splits: blocks that share the columns of the same rows; their sums are added by a second kernel.
    """

    kind: str
    warps: int
    row_tiles: int
    token_tiles: int
    splits: int = 1

    @property
    def kernel(self) -> str:
        return f"{self.kind}_w{self.warps}_r{self.row_tiles}_m{self.token_tiles}"

    @property
    def name(self) -> str:
        return self.kernel if self.splits == 1 else f"{self.kernel}_s{self.splits}"

    @classmethod
    def named(cls, name: str) -> Variant:
        """Undo :attr:`name`.

        Raises:
            ValueError: no variant of that name is compiled.
        """
        kernel, _, splits = name.partition("_s")
        found = next((v for v in VARIANTS if v.kernel == kernel), None)
        split = found is not None and found.kind == "tiled" and splits.isdigit() and 2 <= int(splits) <= MOST_SPLITS
        if found is None or (name != kernel and not split):
            raise ValueError(f"no kernel {name!r}")
        return replace(found, splits=int(splits)) if split else found

    def fits(self, tokens: int, columns: int) -> bool:
        """Whether it takes ``tokens`` at once, and has columns enough to split."""
        return (self.kind != "decode" or tokens <= 8 * self.token_tiles) and self.splits <= tiles(1, columns)[1]

    def launch(self, tokens: int, rows: int) -> Launch:
        if self.kind == "decode":
            blocks = -(-rows // (16 * self.row_tiles))
            return Launch(
                self.kernel, (blocks, 1, 1), 32 * self.warps, self.warps * self.row_tiles * self.token_tiles * 512
            )
        grid = (-(-tokens // (8 * self.token_tiles)), -(-rows // (16 * self.row_tiles * self.warps)), self.splits)
        return Launch(self.kernel, grid, 32 * self.warps, 2 * 8 * self.token_tiles * _STAGE_ROW)


# Bytes that kernels/tiled.h stages of a token.
_STAGE_ROW = 576
# Of the columns, at most.
MOST_SPLITS = 64
# Those that kernels/kernels.cu compiles.
DECODE = tuple(Variant("decode", w, r, m) for w, r in ((8, 1), (4, 1), (16, 1), (8, 2)) for m in (1, 2))
TILED = tuple(Variant("tiled", w, r, m) for w, r in ((4, 1), (8, 1), (8, 2)) for m in (4, 8))
VARIANTS = DECODE + TILED


def add_splits_launch(tokens: int, rows: int) -> Launch:
    return Launch("add_splits", (-(-tokens * rows // 256), 1, 1), 256, 0)


def unpack_launch(count: int, columns: int) -> Launch:
    """``count`` rows of ``columns``."""
    high, wide = tiles(count, columns)
    return Launch("unpack", (wide, high, 1), 32, 0)
