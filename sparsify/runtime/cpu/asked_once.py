"""What is asked once of constant weights, since it takes as long as a small product: whether codes are codes, and
whether tensors are those of one matrix.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from sparsify.errors import BackendError
from sparsify.runtime.codes import ascending
from sparsify.runtime.layout import UNIT


class _Known:
    """What was found of tensors, until they are changed in place, given other memory, or gone.

    A change that torch does not count (of a tensor made in inference mode, or through shared memory) goes unseen.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Tensor], int, int | None, Any]] = {}

    def of(self, tensor: Tensor) -> Any:
        """What was remembered of ``tensor`` as it is; None where nothing was."""
        entry = self._entries.get(id(tensor))
        if entry is None:
            return None
        same, at, version, found = entry
        # A tensor made in inference mode has no version, and raises where it is asked for one.
        if same() is not tensor or tensor.data_ptr() != at or (version is not None and tensor._version != version):
            return None
        return found

    def remember(self, tensor: Tensor, found: Any) -> None:
        key, version = id(tensor), None if tensor.is_inference() else tensor._version
        same = weakref.ref(tensor, lambda gone: self._forget(key, gone))
        self._entries[key] = (same, tensor.data_ptr(), version, found)

    def _forget(self, key: int, gone: weakref.ref[Tensor]) -> None:
        # Another tensor may have the number by now.
        if (entry := self._entries.get(key)) is not None and entry[0] is gone:
            del self._entries[key]


class KnownCodes:
    """Tensors that were found to hold nothing but two ascending positions a nibble.

    A change that goes unseen gives wrong products, and reads nothing outside of the tensors, for a nibble is four
    positions at most.
    """

    def __init__(self) -> None:
        self._known = _Known()

    def check(self, codes: Tensor) -> None:
        """Refuse codes that are none.

        Raises:
            BackendError: a nibble that is not two ascending positions.
        """
        if self._known.of(codes):
            return
        if not ascending(codes):
            raise BackendError(
                f"a product with packed24 weights, codes {list(codes.shape)}",
                found="a code that is not two ascending positions of four",
                do="Pack the matrix again: these are not the codes of one",
            )
        self._known.remember(codes, True)


class KnownMatrices:
    """Tensors that were found to be those of one matrix, and for inputs of which dtype and widths they are.

    Held by the tensor of codes, weakly. What a tensor cannot change in place, its dtype, is not asked again; its length
    the kernels look at in every call, and its codes are asked again where it was changed.
    """

    def __init__(self) -> None:
        self._known = _Known()

    def rows(self, x: Tensor, values: Tensor, codes: Tensor, starts: Tensor | None, bias: Tensor | None) -> int:
        """Rows of the matrix, where ``x`` and ``bias`` fit it; -1 where all has to be looked at."""
        known = self._known.of(codes)
        if known is None or x is None:
            return -1
        values_at, starts_at, dtype, below, columns, rows = known
        if values_at() is not values or (starts_at is not None and starts_at() is not starts):
            return -1
        size = x.shape
        if x.dtype is not dtype or not size or not below < size[-1] <= columns:
            return -1
        if bias is not None and (bias.dtype is not dtype or bias.shape != (rows,)):
            return -1
        found: int = rows
        return found

    def remember(self, values: Tensor, codes: Tensor, starts: Tensor | None, rows: int, columns: int) -> None:
        """That these are a matrix of ``rows`` and, padded, ``columns``."""
        starts_at = None if starts is None else weakref.ref(starts)
        self._known.remember(codes, (weakref.ref(values), starts_at, values.dtype, columns - UNIT, columns, rows))


class KnownFew:
    """The same of matrices of 8 and 4 bits, held by their scales: with what the kernels take of one, which is as it was
    while every tensor is the same and lies where it lay.
    """

    def __init__(self) -> None:
        self._known = _Known()

    def given(
        self, x: Tensor, scales: Tensor, parts: tuple[Tensor | None, ...], bits: int, group: int, bias: Tensor | None
    ) -> Any:
        """What the kernels take, where ``x`` and ``bias`` fit the matrix; None where all has to be looked at.

        Args:
            parts: values, codes and starts, None where a layout has none.
        """
        known = self._known.of(scales)
        if known is None or x is None:
            return None
        held, form, dtype, width, rows, given = known
        size = x.shape
        if form != (bits, group) or x.dtype is not dtype or not size or size[-1] != width:
            return None
        for part, (same, at) in zip(parts, held, strict=True):
            if part is not (same if same is None else same()) or (part is not None and part.data_ptr() != at):
                return None
        if bias is not None and (bias.dtype is not dtype or bias.shape != (rows,)):
            return None
        return given

    def remember(
        self, scales: Tensor, parts: tuple[Tensor | None, ...], bits: int, group: int, width: int, given: Any
    ) -> None:
        """That these are a matrix of ``width`` columns, of which the kernels take ``given``."""
        held = [(None, 0) if part is None else (weakref.ref(part), part.data_ptr()) for part in parts]
        self._known.remember(scales, (held, (bits, group), scales.dtype, width, scales.shape[0], given))
