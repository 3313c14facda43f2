"""Wanda: prune by weight magnitude times the norm of the input that the weight multiplies.

Source: Sun, Liu, Bair, Kolter, "A Simple and Effective Pruning Approach for Large Language Models" (2306.11695),
section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from sparsify.passes.magnitude import Magnitude
from torch import Tensor

from sparsify.calibration.statistics import InputStatistics
from sparsify.errors import CalibrationError
from sparsify.pattern import NM, Unstructured
from sparsify.selection import select
from sparsify.weight_pass import Pruned, WeightPass


@dataclass(frozen=True)
class Wanda(WeightPass):
    """Prune by S_ij = |W_ij| · ‖X_j‖₂ (equation 1), comparing the weights of one output neuron.

    Args:
        variant: choose each row's own sparsity by the share of its score that it loses (the official code's
            ``--use_variant``; algorithms.md, section 3.1). Unstructured patterns only.

    >>> import torch
    >>> from sparsify.calibration.statistics import InputStatistics
    >>> from sparsify.spec import parse_pass
    >>> weight = torch.tensor([[4.0, -1.0, 2.0, 3.0]])
    >>> norms = InputStatistics({"squared_norm": torch.tensor([1.0, 100.0, 1.0, 1.0])}, tokens=8, sequences=1)
    >>> parse_pass("wanda:2:4").prune(weight, norms).weight
    tensor([[ 4., -1.,  0.,  0.]])
    """

    variant: bool = False

    name: ClassVar[str] = "wanda"
    summary: ClassVar[str] = "smallest |W|·‖X‖ per output neuron; one forward"
    statistics: ClassVar[tuple[str, ...]] = ("squared_norm",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant and isinstance(self.pattern, NM):
            raise self._refuse("variant=true", "the variant gives rows different sparsities", "Ask for a percentage")
        if self.variant and (self.group, self.blocksize, self.count) != (None, 1, "floor"):
            raise self._refuse("variant=true", "it chooses its own counts per row", "Leave group and count out")

    def prune(self, weight: Tensor, statistics: InputStatistics) -> Pruned:
        scores = wanda_scores(weight, statistics.squared_norm)
        if self.variant and isinstance(self.pattern, Unstructured):
            mask = variant_mask(scores, float(self.pattern.sparsity))
        else:
            mask = select(scores, self.pattern, self.comparison)
        return Pruned(weight.masked_fill(mask, 0), mask)

    def without_data(self) -> WeightPass:
        if isinstance(self.pattern, NM):
            return Magnitude(self.pattern)
        return Magnitude(self.pattern, self.comparison.axis, self.blocksize, self.count)


def wanda_scores(weight: Tensor, squared_norm: Tensor) -> Tensor:
    """|W_ij| · ‖X_j‖₂ / √n in float32; ``weight`` [out_features, in_features], ``squared_norm`` [in_features].

    Raises:
        CalibrationError: every input is zero, so that the scores would order weights by their index alone.
    """
    if not bool(squared_norm.any()):
        raise CalibrationError(
            "wanda scores",
            found="an input that is zero on every calibration token",
            do="Use other calibration data",
        )
    return weight.abs() * squared_norm.sqrt().to(torch.float32)


def variant_mask(scores: Tensor, sparsity: float) -> Tensor:
    """Prune, in each row, the most smallest scores whose sum stays within α of the row's; α meets ``sparsity``.

    One α ∈ [0, 0.8] for the whole layer, by bisection to 0.001 in sparsity or in α, as in the official code. A row in
    which not even one score fits loses nothing (there the official code crashes).

    Args:
        scores: [out_features, in_features].
    """
    ordered, cumulative = (s := scores.sort(dim=1, stable=True).values), s.cumsum(dim=1)
    total = scores.sum(dim=1, keepdim=True)

    def mask_at(alpha: float) -> Tensor:
        fitting = (cumulative <= alpha * total).sum(dim=1, keepdim=True)
        threshold = ordered.gather(1, (fitting - 1).clamp(min=0))
        return (scores <= threshold) & (fitting > 0)

    low, high, alpha = 0.0, 0.8, 0.4
    mask = mask_at(alpha)
    reached = mask.float().mean().item()
    while abs(reached - sparsity) > 0.001 and high - low >= 0.001:
        if reached > sparsity:
            alpha, high = (alpha + low) / 2, alpha
        else:
            alpha, low = (alpha + high) / 2, alpha
        mask = mask_at(alpha)
        reached = mask.float().mean().item()
    return mask
