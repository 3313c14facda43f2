"""Twin: the kept weights are fitted to the outputs of the dense model, from the inputs of the pruned one.

Known from quantisation as asymmetric calibration; algorithms.md, section 8.1 for the exact solution, fitting.py for
the objective. What earlier sites lost is corrected here, as far as this site can.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsify.method.statistics import InputStatistics
from sparsify.method.weight_pass import Pruned
from sparsify.passes.apt import MaskedPass
from sparsify.passes.solvers.fitting import FitTarget


@dataclass(frozen=True)
class Twin(MaskedPass):
    """Fit the kept weights to the dense model's outputs; the mask is chosen on the goal W*, not on W.

    ``blend`` and ``percdamp`` are the a and λ of :mod:`sparsify.passes.solvers.fitting`.

    Args:
        mask: whose mask, by the name of a pass, or ``S``, ``M`` (see apt) or ``zeros``, those of the pass before; alps
            where none is named.
        target: the dense model's outputs, always.

    >>> from sparsify.method.spec import parse_pass, spec_text
    >>> spec_text(parse_pass("twin:2:4,mask=sparsegpt,blend=1"))
    'twin:2:4,blend=1.0,mask=sparsegpt'
    """

    target: FitTarget = "dense"

    name: ClassVar[str] = "twin"
    summary: ClassVar[str] = "fitted to the dense model's outputs: two forwards, two Gram matrices, best quality"
    when: ClassVar[str] = "when quality matters: the best single pass; add refine after it for more"
    example: ClassVar[str] = "twin:2:4"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target != "dense":
            raise self._refuse("target=pruned", "twin fits to the dense model", f"Use apt:{self.pattern},mask=alps")

    @property
    def _default_mask(self) -> str:
        return "alps"

    def prune(self, weight: Tensor, statistics: InputStatistics) -> Pruned:
        problem = self._problem(weight, statistics)
        mask = self.choose(problem.goal, statistics, problem)
        return problem.finished(problem.solved(mask, "exact", self.solver), mask)
