"""Magnitude pruning: the smallest weights go. No data is needed.

Source: the baseline of Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (2306.11695).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsify.calibration.statistics import InputStatistics
from sparsify.selection import Axis, select
from sparsify.weight_pass import Pruned, WeightPass


@dataclass(frozen=True)
class Magnitude(WeightPass):
    """Prune by S = |W|; unstructured patterns compare all weights of a layer (``group=layer``).

    ``count=threshold`` is the official code's rule: everything up to and including the score at sorted index
    floor(n·s), which is one weight more than the default, and every tie.

    >>> from sparsify.spec import parse_pass
    >>> parse_pass("magnitude:2:4")
    Magnitude(pattern=NM(n=2, m=4), group=None, blocksize=1, count='floor')
    """

    name: ClassVar[str] = "magnitude"
    summary: ClassVar[str] = "smallest |W|; no data"
    default_group: ClassVar[Axis] = "layer"

    def prune(self, weight: Tensor, statistics: InputStatistics) -> Pruned:
        mask = select(weight.abs(), self.pattern, self.comparison)
        return Pruned(weight.masked_fill(mask, 0), mask)
