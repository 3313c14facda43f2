"""Scores from weights and gradients alone: the metrics of BERT pruning that the Wanda paper compares with.

Source: Wanda (2306.11695), appendix C; the metrics as algorithms.md, section 11 gives them: SNIP (1810.02340),
Movement (2005.07683), PLATON (2206.12562). Here they are one-shot, with gradients of the calibration loss. BERT-LTH's
is ``magnitude``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from sparsify.method.selection import Axis, select
from sparsify.method.statistics import InputStatistics
from sparsify.method.weight_pass import Pruned, WeightPass
from sparsify.tensors import zeroed

_NEEDS = {
    "snip": "gradient",
    "movement": "gradient",
    "platon": "gradient_platon",
    "l1": "gradient_l1",
    "l2": "gradient_l2",
}


@dataclass(frozen=True)
class Gradient(WeightPass):
    """Prune by a score of w and the gradients g_s of the samples; unstructured patterns compare a layer's weights.

    Args:
        metric: which score: ``snip`` |w·Σg|; ``movement`` −w·Σg, by which a weight that the loss pushes to zero goes;
            ``platon`` smoothed |w·g| times its smoothed deviation over samples; ``l1`` |w|·Σ|g| and ``l2`` |w|·√Σg²,
            GBLM without activations.
    """

    metric: Literal["snip", "movement", "platon", "l1", "l2"] = "snip"

    name: ClassVar[str] = "gradient"
    summary: ClassVar[str] = "scores of BERT pruning from weight and gradient; forward and backward per sample"
    when: ClassVar[str] = "for encoders and classifiers with labels, whose methods these are"
    example: ClassVar[str] = "gradient:50%,metric=movement"
    default_group: ClassVar[Axis] = "layer"

    @property
    def statistics(self) -> tuple[str, ...]:
        return ("squared_norm", _NEEDS[self.metric])

    def prune(self, weight: Tensor, statistics: InputStatistics) -> Pruned:
        gradient, w = statistics.values[_NEEDS[self.metric]], weight.float()
        if self.metric == "movement":
            scores = -w * gradient
        elif self.metric == "platon":
            # |w| enters both factors: the smoothed |w·g| and its smoothed deviation.
            scores = w.square() * gradient
        else:
            scores = (w * gradient).abs()
        mask = select(scores, self.pattern, self.comparison)
        return Pruned(zeroed(weight, mask), mask)
