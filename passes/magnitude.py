"""Magnitude pruning: the smallest weights go. No data is needed.

Source: the baseline of Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (2306.11695).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsify.method.selection import Axis
from sparsify.method.statistics import InputStatistics
from sparsify.passes.solvers.scored import ScoredPass


@dataclass(frozen=True)
class Magnitude(ScoredPass):
    """Prune by S = |W|; unstructured patterns compare all weights of a layer (``group=layer``).

    ``count=threshold`` is the official code's rule: everything up to and including the score at sorted index
    floor(n·s), which is one weight more than the default, and every tie.

    >>> from sparsify.method.spec import parse_pass, spec_text
    >>> spec_text(parse_pass("magnitude:2:4,update=sequential"))
    'magnitude:2:4,update=sequential'
    """

    name: ClassVar[str] = "magnitude"
    summary: ClassVar[str] = "smallest |W|; no data"
    when: ClassVar[str] = "as a baseline, or where there is no data and no time; wanda is far better for one forward"
    example: ClassVar[str] = "magnitude:50%"
    default_group: ClassVar[Axis] = "layer"

    def multiplier(self, statistics: InputStatistics) -> None:
        return None
