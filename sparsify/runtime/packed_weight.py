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

    Attributes:
        starts: ``row_starts`` of a bitmask; None for the others. exact: of few bits: activations stay in floating point
            and are not rounded to 8 bits.
    """

    packed: Packed
    starts: Tensor | None
    experts: int | None = None
    exact: bool = False

    @classmethod
    def of(cls, weight: Tensor, layout: Layout) -> PackedWeight:
        """Pack ``weight`` [out_features, in_features] or [experts, out_features, in_features].

        Raises:
            PatternError: as :func:`pack`.
        """
        packed = pack(weight.reshape(-1, weight.shape[-1]), layout)
        return cls.holding(packed, weight.shape[0] if weight.dim() == 3 else None)

    @classmethod
    def holding(cls, packed: Packed, experts: int | None = None, *, exact: bool = False) -> PackedWeight:
        starts = row_starts(packed.codes, packed.bits) if packed.layout == "bitmask" else None
        return cls(packed, starts, experts, exact)

    @classmethod
    def joined(cls, weights: Sequence[PackedWeight]) -> PackedWeight:
        """Matrices of one layout, width, bits and group, one below the other."""
        return cls.holding(concatenate([w.packed for w in weights]), exact=weights[0].exact)

    @property
    def rows(self) -> int:
        """Output neurons of one matrix."""
        return self.packed.shape[0] // (self.experts or 1)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What the operator takes after ``x``, in its order."""
        packed = self.packed
        values = packed.values if packed.layout == "bitmask" else self._stacked(packed.values)
        found = {} if packed.scales is None else {"scales": self._stacked(packed.scales)}
        if self.starts is not None:
            return found | {"values": values, "mask": self._stacked(packed.codes), "starts": self.starts}
        if packed.layout == "dense":
            return found | {"values": values}
        return found | {"values": values, "meta": self._stacked(packed.codes)}

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
        return self.packed.dtype

    @property
    def numbers(self) -> tuple[int | bool, ...]:
        """What the operator takes behind :attr:`tensors`: of few bits these, the group (0: the row), and ``exact``."""
        return operator_numbers(self.packed.bits, self.packed.group, self.exact)

    def arguments(self, held: Mapping[str, T]) -> tuple[T | int | bool, ...]:
        """What the operator takes between ``x`` and the bias, with ``held`` in the place of :attr:`tensors`."""
        return (*(held[name] for name in self.tensors), *self.numbers)

    @property
    def operator(self) -> OpOverload[..., Tensor]:
        return operator_of(self.layout, self.packed.bits is not None, self.experts is not None)

    def linear(self, x: Tensor) -> Tensor:
        """``x`` [..., in_features] times a single matrix."""
        return self.operator(x, *self.tensors.values(), *self.numbers)


def operator_of(layout: Layout, few: bool, stacked: bool) -> OpOverload[..., Tensor]:
    """The operator of matrices, or of stacks of them by expert, packed as ``layout``.

    Args:
        few: whether their values are of few bits.
    """
    kind = {"packed24": "24"}.get(layout, layout)
    operator: OpOverload[..., Tensor] = getattr(
        ops, f"{'experts' if stacked else 'linear'}_{kind}{'_few' if few else ''}"
    )
    return operator


def operator_numbers(bits: int | None, group: int | None, exact: bool) -> tuple[int | bool, ...]:
    return () if bits is None else (bits, group or 0, exact)
