"""GBLM-Pruner: Wanda's score with the gradient of the language-modelling loss beside the norm of the input.

Source: Das, Ma, Shen, "Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models" (2311.04902),
equation 3; algorithms.md, section 7. Unlike the official code, gradients are taken in eval mode and summed in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from sparsify.method.statistics import InputStatistics
from sparsify.passes.solvers.scored import ScoredPass
from sparsify.passes.wanda import input_norm


@dataclass(frozen=True)
class GBLM(ScoredPass):
    """Prune by S_ij = |W_ij| · (‖X_j‖₂ / √n + α·G_ij), comparing the weights of one output neuron.

    Args:
        norm: how gradients of the n samples are combined: ``l2`` √Σg², ``l1`` Σ|g|.
        alpha: the weight of the gradients.
        reduction: ``sum``, as the official code, by which G grows with the number of samples and ‖X‖/√n does not;
            ``mean`` divides the sum over samples by n (inside the root for ``l2``).

    >>> from sparsify.method.spec import parse_pass, spec_text
    >>> spec_text(parse_pass("gblm:50%,norm=l1"))
    'gblm:50%,norm=l1'
    """

    norm: Literal["l2", "l1"] = "l2"
    alpha: float = 100.0
    reduction: Literal["sum", "mean"] = "sum"

    name: ClassVar[str] = "gblm"
    summary: ClassVar[str] = "smallest |W|·(‖X‖ + α|gradient|); one forward, and forward and backward per sample"
    when: ClassVar[str] = "to compare with its paper; wanda costs less and twin gives more"
    example: ClassVar[str] = "gblm:50%,norm=l1"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alpha > 0:
            raise self._refuse(f"alpha={self.alpha:g}", "it must be positive", "Use wanda for no gradients")

    @property
    def scored(self) -> tuple[str, ...]:
        return ("squared_norm", f"gradient_{self.norm}")

    def multiplier(self, statistics: InputStatistics) -> Tensor:
        gradient = statistics.values[f"gradient_{self.norm}"]
        if self.reduction == "mean":
            gradient = gradient / statistics.sequences ** (0.5 if self.norm == "l2" else 1.0)
        return input_norm(statistics) + self.alpha * gradient
