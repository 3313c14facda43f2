"""Weights that compressed-tensors stored without their zeros: ``sparse-24-bitmask`` and ``sparse-bitmask``.

``X.compressed`` has the values, ``X.bitmask`` uint8 [rows, ceil(columns / 8)] a bit for each place (column 0 lowest)
that has one, ``X.shape`` the two sizes. Of 2:4 the values are [rows, columns / 2], two of each four columns, zeros
among them where fewer were left; else they are flat, and ``X.row_offsets`` [rows] says where each row begins. Values
may be quantized themselves (``X.weight_scale`` beside them): with their zeros they are what
:mod:`.plain` reads. Source: ``sparse_24_bitmask.py`` and ``sparse_bitmask.py`` of
compressed-tensors 0.9.4; later ones lost them, as vLLM lost the kernels (its pull request 36799).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.errors import CheckpointError
from sparsify.files.checkpoint import Checkpoint
from sparsify.files.ledger import Ledger
from sparsify.quantized.dense import FLOAT8, FLOATS, Dense, Layout, part, refused
from sparsify.runtime.codes import unpack_bits

TWO_FOUR, BITMASK = "sparse-24-bitmask", "sparse-bitmask"
_VALUES, _MASK, _SHAPE, _STARTS = ".compressed", ".bitmask", ".shape", ".row_offsets"
_WHOLE = (torch.int32, torch.int64)


@dataclass(frozen=True)
class _Stored:
    """One weight: the names of its parts, and its sizes. ``starts`` is None of 2:4."""

    values: str
    mask: str
    starts: str | None
    sizes: str
    shape: torch.Size


def has_zeros_left_out(checkpoint: Checkpoint) -> bool:
    return any(name.endswith((_MASK, _VALUES)) for name in checkpoint.names())


class WithZeros:
    """A checkpoint whose weights are stored without their zeros, read as if they lay there with them.

    Raises:
        CheckpointError: a part of a weight that is missing, or of another shape or dtype than the others say.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        known = set(checkpoint.names())
        self._stored = {
            f"{base}.weight": _parts(checkpoint, known, base)
            for base in sorted({n.rpartition(".")[0] for n in known if n.endswith((_MASK, _VALUES))})
        }
        if clash := next((name for name in self._stored if name in known), None):
            raise CheckpointError(
                f"weight {clash}", found="its values with their zeros beside those without", do="Fetch the folder again"
            )
        taken = {n for s in self._stored.values() for n in (s.values, s.mask, s.starts, s.sizes) if n is not None}
        self._names = [name for name in checkpoint.names() if name not in taken] + list(self._stored)

    @property
    def ledger(self) -> Ledger:
        return self.checkpoint.ledger

    @ledger.setter
    def ledger(self, ledger: Ledger) -> None:
        self.checkpoint.ledger = ledger

    @property
    def method(self) -> str:
        return BITMASK if any(stored.starts is not None for stored in self._stored.values()) else TWO_FOUR

    def names(self) -> Iterable[str]:
        return self._names

    def shape(self, name: str) -> torch.Size:
        return self._stored[name].shape if name in self._stored else self.checkpoint.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.checkpoint.dtype(self._stored[name].values if name in self._stored else name)

    def nbytes(self) -> int:
        return self.checkpoint.nbytes()

    def read(self, name: str) -> Tensor:
        """Raises:
        CheckpointError: a mask that does not have as many places as there are values, or is not 2:4.
        """
        if name not in self._stored:
            return self.checkpoint.read(name)
        stored = self._stored[name]
        values, mask = self.checkpoint.read(stored.values), self.checkpoint.read(stored.mask)
        starts = None if stored.starts is None else self.checkpoint.read(stored.starts)
        return with_zeros(name, values, mask, starts, stored.shape)

    def layout(self, where: str) -> Layout:
        """What is in the file, where its values are not quantized.

        Raises:
            CheckpointError: they are.
        """
        dtypes = {self.dtype(name) for name in self._stored}
        if not dtypes <= set(FLOATS):
            odd = next(name for name in self._stored if self.dtype(name) not in FLOATS)
            raise refused(where, f"{odd} is stored in {self.dtype(odd)}, and quantization_config names no groups")
        dense = {name: Dense({"weight": name}, stored.shape, _as_it_is) for name, stored in self._stored.items()}
        return Layout(self.method, dense, dtype=next(iter(dtypes)) if len(dtypes) == 1 else torch.float32)


def with_zeros(name: str, values: Tensor, mask: Tensor, starts: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """The weight ``name`` [rows, columns] of what is stored of it, the shapes of which fit.

    Args:
        starts: where each row begins; None of 2:4.

    Raises:
        CheckpointError: a mask that does not have as many places as there are values, or is not 2:4.
    """
    base, (rows, columns) = name.removesuffix(".weight"), shape
    kept = unpack_bits(mask).view(len(mask), 8 * mask.shape[1])
    found = None
    if bool(kept[:, columns:].any()):
        found = f"{base}{_MASK} has places past its {columns} columns"
    kept = kept[:, :columns]
    counts = kept.sum(1)
    if found is None and int(counts.sum()) != values.numel():
        found = f"{base}{_MASK} has {int(counts.sum())} places for {values.numel()} values"
    elif starts is None and not bool((kept.reshape(rows, -1, 4).sum(-1) == 2).all()):
        found = f"{base}{_MASK} has not two places of every four"
    elif starts is not None and not torch.equal(starts.flatten().long(), counts.cumsum(0) - counts):
        found = f"{base}{_STARTS} does not count the places of {base}{_MASK}"
    if found is not None:
        raise CheckpointError(f"weight {name}", found=found, do="The file is damaged: fetch the folder again")
    # torch indexes no float8; its bytes are as good.
    raw = values.view(torch.int8) if values.dtype in FLOAT8 else values
    full = torch.zeros(rows, columns, dtype=raw.dtype)
    full[kept] = raw.flatten()
    return full.view(values.dtype)


def _as_it_is(parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    return parts["weight"].to(dtype)


def _parts(checkpoint: Checkpoint, known: Collection[str], base: str) -> _Stored:
    weight, sizes = f"{base}.weight", f"{base}{_SHAPE}"
    part(checkpoint, known, sizes, weight, _WHOLE, [(2,), (2, 1), (1, 2)])
    rows, columns = checkpoint.read(sizes).flatten().tolist()
    if not (0 <= rows < 1 << 32 and 0 <= columns < 1 << 32):
        raise CheckpointError(f"weight {weight}", found=f"{sizes} says {rows}×{columns}", do="Fetch the folder again")
    mask = part(checkpoint, known, f"{base}{_MASK}", weight, (torch.uint8,), [(rows, -(-columns // 8))])
    kinds = (*FLOATS, *FLOAT8, torch.int8)
    starts = f"{base}{_STARTS}"
    if starts not in known:
        # Without them it is 2:4, whatever the config says.
        if columns % 4:
            raise CheckpointError(
                f"weight {weight}",
                found=f"{columns} columns, and no {starts} where 2:4 has whole groups of four",
                do="Fetch the folder again",
            )
        values = part(checkpoint, known, f"{base}{_VALUES}", weight, kinds, [(rows, columns // 2)])
        return _Stored(values, mask, None, sizes, torch.Size((rows, columns)))
    part(checkpoint, known, starts, weight, _WHOLE, [(rows,), (rows, 1)])
    values = part(checkpoint, known, f"{base}{_VALUES}", weight, kinds)
    return _Stored(values, mask, starts, sizes, torch.Size((rows, columns)))
