"""What became of the weights of a graph that was lowered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sparsify.analysis.contraction import Contraction, NotUnderstood
from sparsify.runtime.cpu.stopwatch import Timing
from sparsify.runtime.cuda.prepared import PreparedWeight
from sparsify.runtime.packed_weight import PackedWeight


@dataclass(frozen=True)
class Lowered:
    """What became of one contraction: ``layout`` is packed24, bitmask or dense; ``reason``: why it is dense.

    ``bits``, ``group``: of integers, theirs and the in_features that share a scale (None: a row).
    ``kernel``: what runs it; ``merged``: the other weights that one packed matrix holds with it. On a GPU ``plan`` says
    which kernel serves how many tokens (:mod:`sparsify.runtime.cuda.dispatch`), and ``gains`` how much faster than
    cuBLAS it was measured to be, by token count.
    """

    name: str
    node: str
    shape: tuple[int, ...]
    layout: str
    kernel: str
    reason: str | None = None
    timing: Timing | None = None
    merged: tuple[str, ...] = ()
    plan: str | None = None
    gains: Mapping[int, float] = field(default_factory=dict)
    bits: int | None = None
    group: int | None = None

    @classmethod
    def dense(
        cls,
        item: Contraction | NotUnderstood,
        reason: str,
        kernel: str = "as it was",
        timing: Timing | None = None,
    ) -> Lowered:
        return cls(item.name, item.node.name, tuple(item.weight.shape), "dense", kernel, reason, timing)

    @classmethod
    def packed(
        cls,
        item: Contraction,
        weight: PackedWeight | PreparedWeight,
        merged: tuple[str, ...],
        *,
        timing: Timing | None = None,
        plan: str | None = None,
        gains: Mapping[int, float] | None = None,
    ) -> Lowered:
        shape, kernel = tuple(item.weight.shape), str(weight.operator)
        bits, group = (weight.packed.bits, weight.packed.group) if isinstance(weight, PackedWeight) else (None, None)
        layout, known = weight.layout, gains or {}
        return cls(item.name, item.node.name, shape, layout, kernel, None, timing, merged, plan, known, bits, group)
