"""What is best done with each weight of a graph, found from the weights alone: packed, joined, or left dense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsify.errors import Refused
from sparsify.method.grids.finding import found_grid
from sparsify.runtime.cpu.stopwatch import FASTER, Stopwatch, Timing
from sparsify.runtime.cuda.gpu import GPU, NO_EXPERTS
from sparsify.runtime.cuda.prepared import PreparedWeight, prepare_weight
from sparsify.runtime.few_bits import Integers, choose_few_layout, stored_bytes
from sparsify.runtime.layout import DTYPES, choose_layout, concatenate, pack, pack_integers, packed_bytes
from sparsify.runtime.packed_weight import PackedWeight
from sparsify.runtime.words import Activations, AskedFewLayout, FoundValues, Layout, PackingChoice, Policy

_Key = tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype]


@dataclass
class Packer:
    """Decides for one graph, by options of the pass. Each weight is packed once, and each shape timed once."""

    layout: AskedFewLayout
    choice: PackingChoice
    policy: Policy
    target: GPU | None
    values: FoundValues = "auto"
    activations: Activations = "float"
    watch: Stopwatch = field(default_factory=Stopwatch)
    _packed: dict[_Key, PackedWeight | Refused] = field(default_factory=dict)
    _timings: dict[_Key, Timing] = field(default_factory=dict)

    @property
    def measures(self) -> bool:
        return self.choice == "measured"

    def gpu(self, weight: Tensor) -> GPU | None:
        """The GPU that ``weight`` is lowered for; None on a CPU."""
        if self.target is not None:
            return self.target
        return GPU.of(weight.device) if weight.device.type == "cuda" else None

    def timing(self, weight: Tensor) -> Timing | None:
        """What was measured of ``weight``; None where nothing was."""
        return self._timings.get(_key(weight))

    def packed(self, weight: Tensor) -> PackedWeight | Refused:
        """The weight packed, or why it stays dense; one that several nodes read is packed once."""
        key = _key(weight)
        if key not in self._packed:
            self._packed[key] = self._pack(weight)
        return self._packed[key]

    def _pack(self, weight: Tensor) -> PackedWeight | Refused:
        gpu = self.gpu(weight)
        if gpu is None and weight.device.type != "cpu":
            return Refused(f"on {weight.device}, where there are no packed kernels")
        if gpu is not None:
            if weight.dim() != 2:
                return Refused(NO_EXPERTS)
            # A GPU has no kernel for integers: their values lie there at the width of their dtype.
            if (unfit := gpu.unfit(weight.dtype, "packed24" if self.layout == "auto" else self.layout)) is not None:
                return Refused(unfit)
            layout = choose_layout(weight, "packed24")
            return layout if isinstance(layout, Refused) else PackedWeight.of(weight, layout)
        return self._on_cpu(weight)

    def _on_cpu(self, weight: Tensor) -> PackedWeight | Refused:
        flat = weight.detach().reshape(-1, weight.shape[-1])
        forms = self._forms(flat)
        if isinstance(forms, Refused):
            return forms
        experts, rows = (None, flat.shape[0]) if weight.dim() == 2 else weight.shape[:2]
        if not self.measures:
            return self._held(*forms[0], experts)
        raced: list[tuple[Timing, PackedWeight]] = []
        for own, layout in forms:
            # Experts are alike: one tells the time of all.
            first = own.rows(rows) if isinstance(own, Integers) else own[:rows]
            one = self._held(first, layout)
            raced.append((self.watch.packed(weight if experts is None else weight[0], one), one))
        paying = [place for place, (timing, _) in enumerate(raced) if timing.slower is None]
        best = min(paying or range(len(raced)), key=lambda place: raced[place][0].ratio)
        timing, one = raced[best]
        self._timings[_key(weight)] = timing
        if timing.slower is not None:
            label = one.layout if one.packed.bits is None else f"{one.layout} int{one.packed.bits}"
            return Refused(f"dense is faster here ({label} {timing.slower})")
        return one if experts is None else self._held(*forms[best], experts)

    def _forms(self, flat: Tensor) -> list[tuple[Tensor | Integers, Layout]] | Refused:
        """As what ``flat`` [rows, columns] may be packed, smallest first: integers where it lies on their grid, and its
        own values; each with its layout.
        """
        full = choose_layout(flat, self.layout)
        held = _integers(flat) if self.values == "auto" else None
        few = Refused("on no grid") if held is None else choose_few_layout(held, self.layout)
        if held is None or isinstance(few, Refused):
            return full if isinstance(full, Refused) else [(flat, full)]
        if isinstance(full, Refused):
            return [(held, few)]
        # With few values left, their scales take more than they save.
        if packed_bytes(flat, full) < stored_bytes(held, few):
            return [(flat, full), (held, few)]
        return [(held, few), (flat, full)]

    def _held(self, own: Tensor | Integers, layout: Layout, experts: int | None = None) -> PackedWeight:
        packed = pack_integers(own, layout) if isinstance(own, Integers) else pack(own, layout)
        return PackedWeight.holding(packed, experts, exact=self.activations == "float")

    def joined(self, weights: Sequence[PackedWeight]) -> PackedWeight | None:
        """Siblings as one matrix, where one product with it is measured faster than one with each."""
        joined = PackedWeight.joined(weights)
        x = torch.randn(1, joined.columns).to(joined.dtype)
        sizes = [w.rows for w in weights]
        apart, together = self.watch.race(
            [
                lambda: [w.linear(x) for w in weights],
                lambda: torch.split_with_sizes_copy(joined.linear(x), sizes, -1),
            ]
        )
        return joined if together < FASTER * apart else None

    def prepared(self, weights: Sequence[PackedWeight]) -> PreparedWeight | Refused:
        """One matrix, or siblings as one, in the layouts of the GPU; or why it is better dense."""
        packed = weights[0].packed if len(weights) == 1 else concatenate([w.packed for w in weights])
        return prepare_weight(packed, self.policy, tune=self.measures, target=self.target)

    def dense_timing(self, weight: Tensor) -> Timing:
        """What a weight on a CPU that stays dense takes by torch's kernel and by ours."""
        return self.timing(weight) or self.watch.dense(weight)


def _integers(flat: Tensor) -> Integers | None:
    """``flat`` [rows, columns] as integers of few bits and scales, to the bit; None where it lies on no grid."""
    found = found_grid(flat) if flat.dtype in DTYPES else None
    if found is None:
        return None
    return Integers(found.integers, found.scales.to(flat.dtype), found.grid.bits, found.group)


def _key(weight: Tensor) -> _Key:
    return (weight.data_ptr(), tuple(weight.shape), weight.stride(), weight.dtype)
