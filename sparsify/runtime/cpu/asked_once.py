"""What is asked once of constant weights, since it takes as long as a small product: whether codes are codes, and
whether tensors are those of one matrix.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from sparsify.errors import BackendError
from sparsify.runtime.codes import ascending
from sparsify.runtime.layout import UNIT


class KnownCodes:
    """Tensors that were found to hold nothing but two ascending positions a nibble.

    A tensor is asked again when it was changed in place or given other memory. A change that torch does not count (of a
    tensor made in inference mode, or through shared memory) goes unseen: it gives wrong products, and reads nothing
    outside of the tensors, for a nibble is four positions at most.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int, int | None]] = {}

    def check(self, codes: Tensor) -> None:
        """Refuse codes that are none.

        Raises:
            BackendError: a nibble that is not two ascending positions.
        """
        known = self._known.get(id(codes))
        same = known is not None and known[0]() is codes and known[1] == codes.data_ptr()
        # A tensor made in inference mode has no version, and raises where it is asked for one.
        if same and known is not None and (known[2] is None or known[2] == codes._version):
            return
        if not ascending(codes):
            raise BackendError(
                f"a product with packed24 weights, codes {list(codes.shape)}",
                found="a code that is not two ascending positions of four",
                do="Pack the matrix again: these are not the codes of one",
            )
        key, version = id(codes), None if codes.is_inference() else codes._version
        self._known[key] = (weakref.ref(codes, lambda gone: self._forget(key, gone)), codes.data_ptr(), version)

    def _forget(self, key: int, gone: weakref.ref[Tensor]) -> None:
        # Another tensor may have the number by now.
        if (entry := self._known.get(key)) is not None and entry[0] is gone:
            del self._known[key]


class KnownMatrices:
    """Tensors that were found to be those of one matrix, and for inputs of which dtype and widths they are.

    Held by the tensor of codes, weakly. What a tensor cannot change in place, its dtype, is not asked again; its length
    the kernels look at in every call, and its codes are asked again where it was changed.
    """

    def __init__(self) -> None:
        self._known: dict[int, _Matrix] = {}

    def rows(self, x: Tensor, values: Tensor, codes: Tensor, starts: Tensor | None, bias: Tensor | None) -> int:
        """Rows of the matrix, where ``x`` and ``bias`` fit it; -1 where all has to be looked at."""
        known = self._known.get(id(codes))
        if known is None or x is None:
            return -1
        codes_at, values_at, starts_at, at, version, dtype, below, columns, rows = known
        if codes_at() is not codes or values_at() is not values or codes.data_ptr() != at:
            return -1
        if (version is not None and codes._version != version) or (starts_at is not None and starts_at() is not starts):
            return -1
        size = x.shape
        if x.dtype is not dtype or not size or not below < size[-1] <= columns:
            return -1
        if bias is not None and (bias.dtype is not dtype or bias.shape != (rows,)):
            return -1
        return rows

    def remember(self, values: Tensor, codes: Tensor, starts: Tensor | None, rows: int, columns: int) -> None:
        """That these are a matrix of ``rows`` and, padded, ``columns``."""
        key = id(codes)
        self._known[key] = _Matrix(
            weakref.ref(codes, lambda gone: self._forget(key, gone)),
            weakref.ref(values),
            None if starts is None else weakref.ref(starts),
            codes.data_ptr(),
            None if codes.is_inference() else codes._version,
            values.dtype,
            columns - UNIT,
            columns,
            rows,
        )

    def _forget(self, key: int, gone: weakref.ref[Tensor]) -> None:
        if (entry := self._known.get(key)) is not None and entry.codes is gone:
            del self._known[key]


class _Matrix(NamedTuple):
    codes: weakref.ref[Tensor]
    values: weakref.ref[Tensor]
    starts: weakref.ref[Tensor] | None
    at: int
    version: int | None
    dtype: torch.dtype
    below: int
    columns: int
    rows: int
