"""Wanda: prune by weight magnitude times the norm of the input that the weight multiplies.

Source: Sun, Liu, Bair, Kolter, "A Simple and Effective Pruning Approach for Large Language Models" (2306.11695),
section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sparsify.errors import CalibrationError
from sparsify.method.pattern import NM, Unstructured
from sparsify.method.statistics import InputStatistics
from sparsify.passes.solvers.scored import ScoredPass
from sparsify.tensors import all_finite


@dataclass(frozen=True)
class Wanda(ScoredPass):
    """Prune by S_ij = |W_ij| · ‖X_j‖₂ (equation 1), comparing the weights of one output neuron.

    Args:
        norm: which norm of the inputs: ``l2``, or ``l1`` or ``max`` for the ablation.
        variant: choose each row's own sparsity by the share of its score that it loses (the official code's
            ``--use_variant``); for percentages only.

    >>> import torch
    >>> from sparsify.method.statistics import InputStatistics
    >>> from sparsify.method.spec import parse_pass
    >>> weight = torch.tensor([[4.0, -1.0, 2.0, 3.0]])
    >>> norms = InputStatistics({"squared_norm": torch.tensor([1.0, 100.0, 1.0, 1.0])}, tokens=8, sequences=1)
    >>> parse_pass("wanda:2:4").prune(weight, norms).weight
    tensor([[ 4., -1.,  0.,  0.]])
    """

    norm: Literal["l2", "l1", "max"] = "l2"
    variant: bool = False

    name: ClassVar[str] = "wanda"
    summary: ClassVar[str] = "smallest |W|·‖X‖ per output neuron; one forward"
    when: ClassVar[str] = "first: it costs about one forward, and much of what can be had without moving weights"
    example: ClassVar[str] = "wanda:2:4"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant and isinstance(self.pattern, NM):
            raise self._refuse("variant=true", "the variant gives rows different sparsities", "Ask for a percentage")
        if self.variant and (self.group, self.blocksize, self.count, self.allocation) != (None, 1, "floor", "uniform"):
            raise self._refuse("variant=true", "it chooses its own counts", "Leave group, count and allocation out")
        if self.variant and self.update == "iterative":
            raise self._refuse("variant=true,update=iterative", "both choose the mask", "Use update=sequential")

    @property
    def by_rows(self) -> bool:
        return super().by_rows and not self.variant

    @property
    def exact_counts(self) -> bool:
        return not self.variant

    @property
    def scored(self) -> tuple[str, ...]:
        return ({"l2": "squared_norm", "l1": "absolute_sum", "max": "absolute_max"}[self.norm],)

    def multiplier(self, statistics: InputStatistics) -> Tensor:
        if self.norm == "l2":
            return input_norm(statistics)
        return live(statistics.values[self.scored[0]]).to(torch.float32)

    def mask(self, weight: Tensor, statistics: InputStatistics) -> Tensor:
        if self.variant and isinstance(self.pattern, Unstructured):
            return variant_mask(self.scores(weight, statistics), float(self.pattern.sparsity))
        return super().mask(weight, statistics)


def input_norm(statistics: InputStatistics) -> Tensor:
    """‖X_j‖₂ / √n, [in_features] float32.

    Raises:
        CalibrationError: every input is zero, so that scores would order weights by their index alone, or one is no
            number.
    """
    return live(statistics.squared_norm).sqrt().to(torch.float32)


def live(norms: Tensor) -> Tensor:
    """``norms`` if any is not zero and all are finite."""
    if not all_finite(norms):
        raise CalibrationError(
            "wanda scores",
            found="inputs whose norms overflow or are no numbers",
            do="Mend the weights before this layer, take --compute-dtype float32, or leave it out with --ignore",
        )
    if not bool(norms.any()):
        raise CalibrationError(
            "wanda scores",
            found="an input that is zero on every calibration token",
            do="Huge weights before it do that too: is the checkpoint sound? Else use other calibration data, or leave "
            "it out with --ignore",
        )
    return norms


def variant_mask(scores: Tensor, sparsity: float) -> Tensor:
    """Prune, in each row, the most smallest scores whose sum stays within α of the row's; α meets ``sparsity``.

    One α ∈ [0, 0.8] for the whole layer, by bisection to 0.001 in sparsity or in α, as in the official code. A row in
    which not even one score fits loses nothing (there the official code crashes).

    Args:
        scores: [out_features, in_features].
    """
    ordered = scores.sort(dim=1, stable=True).values
    cumulative = ordered.cumsum(dim=1)
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
