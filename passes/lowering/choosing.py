"""What is best done with each weight of a graph, found from the weights alone: packed, joined, or left dense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsify.errors import Refused
from sparsify.runtime.cpu.stopwatch import FASTER, Stopwatch, Timing
from sparsify.runtime.cuda.gpu import GPU, NO_EXPERTS
from sparsify.runtime.cuda.prepared import PreparedWeight, prepare_weight
from sparsify.runtime.layout import choose_layout, concatenate
from sparsify.runtime.packed_weight import PackedWeight
from sparsify.runtime.words import AskedLayout, PackingChoice, Policy

_Key = tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype]


@dataclass
class Packer:
    """Decides for one graph, by options of the pass. Each weight is packed once, and each shape timed once."""

    layout: AskedLayout
    choice: PackingChoice
    policy: Policy
    target: GPU | None
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
        gpu, asked = self.gpu(weight), self.layout
        if gpu is None and weight.device.type != "cpu":
            return Refused(f"on {weight.device}, where there are no packed kernels")
        if gpu is not None:
            if weight.dim() != 2:
                return Refused(NO_EXPERTS)
            if (unfit := gpu.unfit(weight.dtype, "bitmask" if asked == "bitmask" else "packed24")) is not None:
                return Refused(unfit)
            asked = "packed24"
        layout = choose_layout(weight.reshape(-1, weight.shape[-1]), asked)
        if isinstance(layout, Refused):
            return layout
        packed = PackedWeight.of(weight, layout)
        if gpu is None and self.measures:
            # Experts are alike: one tells the time of all.
            one = packed if weight.dim() == 2 else PackedWeight.of(weight[0], layout)
            timing = self.watch.packed(weight if weight.dim() == 2 else weight[0], one)
            self._timings[_key(weight)] = timing
            if timing.slower is not None:
                return Refused(f"dense is faster here ({layout} {timing.slower})")
        return packed

    def joined(self, weights: Sequence[PackedWeight]) -> PackedWeight | None:
        """Siblings as one matrix, where one product with it is measured faster than one with each."""
        joined = PackedWeight.joined(weights)
        x = torch.randn(1, joined.packed.shape[1]).to(joined.packed.values.dtype)
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


def _key(weight: Tensor) -> _Key:
    return (weight.data_ptr(), tuple(weight.shape), weight.stride(), weight.dtype)
