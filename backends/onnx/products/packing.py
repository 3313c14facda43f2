"""How a weight is packed for our operators, and why one is left dense."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir
import torch
from torch import Tensor

from sparsify.backends.onnx.storage.datafile import TYPES
from sparsify.backends.packed.grids import Values
from sparsify.errors import Refused
from sparsify.runtime.few_bits import Integers, choose_few_layout, stored_bytes
from sparsify.runtime.layout import Packed, choose_layout, pack, pack_integers, packed_bytes
from sparsify.runtime.words import Layout

# Of a bitmask of full width: with fewer a token gains little with AVX-512 and loses with AVX2, and prompts lose
# (docs/benchmarks.md).
LEAST_ZEROS = 0.4
# What the library's product of float32 inputs takes; of others it takes their own.
_BESIDE_FLOAT = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Packing:
    """What is asked of packed weights; ``exact``: of few bits, inputs of products stay in floating point."""

    values: Values = field(default_factory=Values)
    exact: bool = False

    def packed(self, weight: Tensor, compute: ir.DataType) -> Packed | Refused:
        """``weight`` [out_features, in_features] as the library multiplies with it, or why it is left dense."""
        if compute != ir.DataType.FLOAT and TYPES.get(weight.dtype) != compute:
            return Refused(f"{weight.dtype} in a graph that computes in {compute.name.lower()}")
        if weight.dtype not in _BESIDE_FLOAT:
            return Refused(f"of {weight.dtype}")
        held = self.values.held(weight)
        if isinstance(held, Integers):
            few = choose_few_layout(held)
            if not isinstance(few, Refused) and (self.values.rounds or self._is_smaller(held, few, weight)):
                return pack_integers(held, few)
        layout = choose_layout(weight)
        if isinstance(layout, Refused):
            return layout
        zeros = zeros_of(weight)
        if layout == "bitmask" and zeros < LEAST_ZEROS:
            return Refused(f"{zeros:.0%} zeros, too few to be faster than dense")
        return pack(weight, layout)

    @staticmethod
    def _is_smaller(held: Integers, few: Layout, weight: Tensor) -> bool:
        """Than by its own values: with few left, their scales take more than they save."""
        full = choose_layout(weight)
        return isinstance(full, Refused) or stored_bytes(held, few) <= packed_bytes(weight, full)


def zeros_of(weight: Tensor) -> float:
    return 1 - int(torch.count_nonzero(weight)) / max(1, weight.numel())
