"""2:4 weights as NVIDIA's libraries take them, for many tokens: cuSPARSELt, and on Ampere and Ada torch's CUTLASS
kernels.

cuSPARSELt's own layout is private: it is made from the dense matrix, one matrix at a time, and read back by multiplying
with the identity, which is exact. CUTLASS takes packed24's values as they are, and its codes reordered.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsify.runtime.layout import Packed, pack, unpack

SparseLibrary = Literal["cusparselt", "cutlass"]
# Both take tokens in eights.
TOKEN_UNIT = 8
# What the libraries need of [rows, columns] in 16-bit dtypes.
_UNITS: dict[SparseLibrary, tuple[int, int]] = {"cusparselt": (16, 16), "cutlass": (32, 64)}


@dataclass(frozen=True)
class Algorithm:
    """One of cuSPARSELt's.

    Attributes:
        number: its own; what is fastest depends on the shape.
        splits: of the columns, added up at the end.
        mode: how (cusparseLtSplitKMode_t: 0 in the same kernel, 1 in a second one); -1 leaves it to the library.
    """

    number: int = 0
    splits: int = 1
    mode: int = -1

    def __str__(self) -> str:
        return f"{self.number}" if self.splits == 1 else f"{self.number}:{self.splits}:{self.mode}"

    @staticmethod
    @lru_cache(maxsize=4096)
    def parse(text: str) -> Algorithm:
        """Undo ``str(algorithm)``.

        Raises:
            ValueError: it is not one's text.
        """
        parts = text.split(":")
        if not all(part.isdigit() for part in parts) or len(parts) not in (1, 3):
            raise ValueError(f"no algorithm {text!r}")
        found = Algorithm(*map(int, parts))
        if str(found) != text or found.splits < 1:
            raise ValueError(f"no algorithm {text!r}")
        return found


def library_of(capability: tuple[int, int]) -> SparseLibrary:
    """CUTLASS's kernels are built for compute capability 8.x alone; cuSPARSELt serves the later ones."""
    return "cutlass" if capability[0] == 8 else "cusparselt"


def unfit(library: SparseLibrary, rows: int, columns: int) -> str | None:
    """Why ``library`` does not take a matrix [rows, columns], or None."""
    high, wide = _UNITS[library]
    if rows % high or columns % wide:
        return f"{library} needs rows in multiples of {high} and columns of {wide}"
    return None


def compress(packed: Packed, library: SparseLibrary) -> tuple[Tensor, Tensor | None]:
    """A packed24 matrix as ``library`` takes it: values and, for CUTLASS, codes of int16 [rows, columns / 16]."""
    if library == "cusparselt":
        return torch._cslt_compress(unpack(packed)), None
    rows = packed.shape[0]
    codes = packed.codes.view(torch.int16)
    places = _cutlass_places(rows, codes.shape[1], codes.device)
    return packed.values, torch.empty_like(codes).view(-1).scatter_(0, places, codes.reshape(-1)).view_as(codes)


def decompress(compressed: Tensor, codes: Tensor | None, shape: tuple[int, int]) -> Packed:
    """Undo :func:`compress`."""
    rows, columns = shape
    if codes is not None:
        flat = codes.reshape(-1)[_cutlass_places(rows, codes.shape[1], codes.device)]
        return Packed("packed24", shape, compressed, flat.view_as(codes).view(torch.uint8).view(rows, -1))
    ones = torch.eye(columns, dtype=compressed.dtype, device=compressed.device)
    return pack(torch._cslt_sparse_mm(compressed, ones)[:rows], "packed24")


def multiply(x: Tensor, compressed: Tensor, codes: Tensor | None, bias: Tensor | None, algorithm: Algorithm) -> Tensor:
    """``x`` [tokens, columns] times the weight, [tokens, rows].

    Args:
        algorithm: of cuSPARSELt; its search finds the fastest for a shape.
    """
    tokens = x.shape[0]
    if tokens % TOKEN_UNIT:
        x = pad(x, (0, 0, 0, -tokens % TOKEN_UNIT))
    if codes is not None:
        y = torch._sparse_semi_structured_linear(x, compressed, codes, bias=bias)
    else:
        y = torch._cslt_sparse_mm(
            compressed, x.t(), bias, transpose_result=True,
            alg_id=algorithm.number, split_k=algorithm.splits, split_k_mode=algorithm.mode,
        )  # fmt: skip
    return y[:tokens]


def search(compressed: Tensor, x: Tensor) -> Algorithm:
    """cuSPARSELt's fastest for ``x`` [tokens, columns], tokens in eights. Runs many."""
    # Without a stub, and not there in CPU builds.
    library: Any = torch._C._cusparselt
    number, splits, mode, _ = library.mm_search(compressed, x.t(), None, None, None, True)
    return Algorithm(number, splits, mode) if splits > 1 else Algorithm(number)


def _cutlass_places(rows: int, columns: int, device: torch.device) -> Tensor:
    """Where CUTLASS keeps each code word of [rows, columns]: rows of 32 interleaved by four, 2×2 blocks transposed,
    pairs of columns together (``reorder_meta`` of its host_reorder.h, for 16-bit words)."""
    row = torch.arange(rows, device=device).view(-1, 1).expand(rows, columns)
    column = torch.arange(columns, device=device).expand(rows, columns)
    row = row // 32 * 32 + row % 8 * 4 + row % 32 // 8
    swap = ((row % 2 == 0) & (column % 2 == 1)).long() - ((row % 2 == 1) & (column % 2 == 0)).long()
    row, column = row + swap, column - swap
    return (column // 2 * rows * 2 + row * 2 + column % 2).reshape(-1)
