"""A weight packed and ready to be multiplied with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverload

from sparsify.runtime import ops
from sparsify.runtime.codes import row_starts
from sparsify.runtime.layout import Packed, concatenate, pack
from sparsify.runtime.words import Layout

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """One packed matrix, or a stack of ``experts`` with their rows one below the other.

    ``starts``: ``row_starts`` of a bitmask; None for packed24.
    """

    packed: Packed
    starts: Tensor | None
    experts: int | None = None

    @classmethod
    def of(cls, weight: Tensor, layout: Layout) -> PackedWeight:
        """Pack ``weight`` [out_features, in_features] or [experts, out_features, in_features].

        Raises:
            PatternError: as :func:`pack`.
        """
        packed = pack(weight.reshape(-1, weight.shape[-1]), layout)
        return cls.holding(packed, weight.shape[0] if weight.dim() == 3 else None)

    @classmethod
    def holding(cls, packed: Packed, experts: int | None = None) -> PackedWeight:
        return cls(packed, row_starts(packed.codes) if packed.layout == "bitmask" else None, experts)

    @classmethod
    def joined(cls, weights: Sequence[PackedWeight]) -> PackedWeight:
        """Matrices of one layout and width, one below the other."""
        return cls.holding(concatenate([w.packed for w in weights]))

    @property
    def rows(self) -> int:
        """Output neurons of one matrix."""
        return self.packed.shape[0] // (self.experts or 1)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What the operator takes after ``x``, in its order."""
        if self.starts is None:
            return {"values": self._stacked(self.packed.values), "meta": self._stacked(self.packed.codes)}
        return {"values": self.packed.values, "mask": self._stacked(self.packed.codes), "starts": self.starts}

    def _stacked(self, tensor: Tensor) -> Tensor:
        """Rows of all experts as [experts, rows, …]."""
        return tensor if self.experts is None else tensor.view(self.experts, self.rows, tensor.shape[-1])

    @property
    def layout(self) -> Layout:
        return self.packed.layout

    @property
    def columns(self) -> int:
        return self.packed.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.packed.values.dtype

    def arguments(self, held: Mapping[str, T]) -> tuple[T, ...]:
        """What the operator takes between ``x`` and the bias, with ``held`` in the place of :attr:`tensors`."""
        return tuple(held[name] for name in self.tensors)

    @property
    def operator(self) -> OpOverload[..., Tensor]:
        if self.experts is None:
            return ops.linear_24 if self.starts is None else ops.linear_bitmask
        return ops.experts_24 if self.starts is None else ops.experts_bitmask

    def linear(self, x: Tensor) -> Tensor:
        """``x`` [..., in_features] times a single matrix."""
        return self.operator(x, *self.tensors.values())
