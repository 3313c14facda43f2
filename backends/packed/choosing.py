"""Whether and how one weight is packed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sparsify.analysis.linear import LinearSite
from sparsify.backends.packed.format import PackedSite, pack_parameter
from sparsify.backends.packed.grids import AGAIN, Values, integers_of, off_center
from sparsify.errors import Refused
from sparsify.ir.weights import Weights
from sparsify.method.grids.finding import found_grid
from sparsify.method.pattern import parse_grid
from sparsify.runtime.cpu.stopwatch import Stopwatch, Timing
from sparsify.runtime.few_bits import Integers, choose_few_layout, stored_bytes
from sparsify.runtime.layout import choose_layout, pack, pack_integers, packed_bytes
from sparsify.runtime.packed_weight import PackedWeight
from sparsify.runtime.words import AskedFewLayout, Layout, PackingChoice

# The share of zeros from which on a weight counts as pruned.
PRUNED = 0.05
# Why an embedding that was rounded is stored at full width.
TABLE = "an embedding, whose rows are looked up: packed layouts are for products, and its values keep their dtype"


@dataclass(frozen=True)
class Decision:
    """What becomes of one weight that the graph multiplies with: packed as ``site``, or dense for ``reason``.

    Attributes:
        zeros: their share. dense_bytes, nbytes: what it takes dense, and as it is stored.
        on_grid: whether its values are integers times scales, or were to be. rounding: ‖ΔW‖/‖W‖ of making them so here;
            None where that was not done. note: what else is to be said of it.
    """

    name: str
    linear: LinearSite
    zeros: float
    dense_bytes: int
    nbytes: int
    site: PackedSite | None = None
    timing: Timing | None = None
    reason: str | None = None
    on_grid: bool = False
    rounding: float | None = None
    note: str | None = None

    @property
    def layout(self) -> Layout:
        return self.site.layout if self.site is not None else "dense"

    def left_dense(self, reason: str) -> Decision:
        """The same weight, not packed after all."""
        return replace(self, site=None, nbytes=self.dense_bytes, reason=reason)

    def as_dict(self) -> dict[str, Any]:
        few = self.site is not None and self.site.bits is not None
        return {
            "name": self.name,
            "shape": [*([self.linear.experts] if self.linear.expert_axis is not None else []), *self.linear.shape],
            "layout": self.layout,
            **({"bits": self.site.bits, "group": self.site.group} if self.site is not None and few else {}),
            **({"rounding": round(self.rounding, 6)} if self.rounding is not None else {}),
            "zeros": round(self.zeros, 4),
            "dense_bytes": self.dense_bytes,
            "bytes": self.nbytes,
            "timing": None if self.timing is None else self.timing.as_dict(),
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Asked:
    """The options of the backend, as far as they choose."""

    layout: AskedFewLayout = "auto"
    choice: PackingChoice = "measured"
    values: Values = field(default_factory=Values)
    exact: bool = False


@dataclass
class Choosing:
    """The choice for one parameter."""

    name: str
    linear: LinearSite
    weights: Weights
    asked: Asked
    watch: Stopwatch

    def decide(self, reason: str | None, usual: bool) -> tuple[Decision, Tensor | None]:
        """What becomes of it, and where it was rounded, the matrices [height, columns].

        Args:
            reason: why it cannot be packed. usual: whether it is one that is rounded where nobody names any.
        """
        stored = self.weights.read(self.name)
        matrices = self.linear.matrices(stored)
        flat = matrices.reshape(-1, matrices.shape[-1])
        zeros = _zeros(flat)
        base = Decision(self.name, self.linear, zeros, stored.nbytes, stored.nbytes)
        if reason is not None:
            return replace(base, reason=reason), None
        values = self.asked.values
        held = values.held(flat)
        if isinstance(held, Refused):
            found = self._packed(replace(base, on_grid=True, note=held.reason), flat, flat)
            return (found if found.site is not None else replace(found, reason=f"{found.reason}; {held.reason}")), None
        if held is not None:
            return self._smaller(replace(base, on_grid=True), flat, held), None
        if values.rounds and (usual or zeros >= PRUNED):
            return self._rounded(replace(base, on_grid=True), flat)
        return self._packed(base, flat, flat), None

    def table(self, reason: str) -> Decision:
        """The same of an embedding, which stays dense for ``reason``, and for its own where it was rounded."""
        stored = self.weights.read(self.name)
        on_grid = stored.dim() == 2 and isinstance(self.asked.values.held(stored), Integers)
        told = f"{reason}; {TABLE}" if on_grid and reason != TABLE else reason
        return Decision(
            self.name, self.linear, _zeros(stored), stored.nbytes, stored.nbytes, reason=told, on_grid=on_grid
        )

    def _smaller(self, base: Decision, flat: Tensor, held: Integers) -> Decision:
        """As integers; where nobody asked for those, by its own values if that is smaller: with few values left, their
        scales take more than they save.
        """
        few, full = choose_few_layout(held, self.asked.layout), choose_layout(flat, self.asked.layout)
        if self.asked.values.rounds or isinstance(full, Refused):
            return self._packed(base, flat, held)
        smaller = not isinstance(few, Refused) and stored_bytes(held, few) <= packed_bytes(flat, full)
        return self._packed(base, flat, held if smaller else flat)

    def _rounded(self, base: Decision, flat: Tensor) -> tuple[Decision, Tensor | None]:
        values = self.asked.values
        result = values.rounded(flat)
        if isinstance(result, Refused):
            return replace(base, reason=result.reason), None
        held = integers_of(result, parse_grid(values.asked).bits, values.group)
        assert held is not None, "what was rounded lies on its grid"
        lost = float((result.float() - flat.float()).norm() / flat.float().norm().clamp(min=1e-30))
        note = AGAIN if found_grid(flat) is None and off_center(flat) else None
        found = self._packed(replace(base, zeros=_zeros(result), note=note), result, held)
        return (found, None) if found.site is None else (replace(found, rounding=lost), result)

    def _packed(self, base: Decision, flat: Tensor, own: Tensor | Integers) -> Decision:
        """``base`` packed, where that is smaller and no slower than the dense ``flat``."""
        layout, linear = self.asked.layout, self.linear
        chosen = choose_few_layout(own, layout) if isinstance(own, Integers) else choose_layout(own, layout)
        if isinstance(chosen, Refused):
            return replace(base, reason=chosen.reason)
        timing = None
        if self.asked.choice == "measured":
            # Experts are alike: one tells the time of all.
            rows = linear.shape[0]
            first = own.rows(rows) if isinstance(own, Integers) else own[:rows]
            packed = pack_integers(first, chosen) if isinstance(first, Integers) else pack(first, chosen)
            timing = self.watch.packed(flat[:rows].contiguous(), PackedWeight.holding(packed, exact=self.asked.exact))
            if timing.slower is not None:
                label = chosen if packed.bits is None else f"{chosen} int{packed.bits}"
                return replace(base, timing=timing, reason=f"dense is faster here ({label} {timing.slower})")
        site, tensors = pack_parameter(
            own,
            chosen,
            experts=linear.experts if linear.expert_axis is not None else None,
            transposed=linear.out_axis > linear.in_axis,
        )
        return replace(base, nbytes=sum(t.nbytes for t in tensors.values()), site=site, timing=timing)


def _zeros(matrix: Tensor) -> float:
    return 1 - int(torch.count_nonzero(matrix)) / max(1, matrix.numel())
