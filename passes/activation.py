"""Activation pruning: whole output neurons whose outputs say least go, bias and all.

Source: Wanda (2306.11695), appendix C, which reports that it fails on language models; algorithms.md, section 11.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from sparsify.method.pattern import NM
from sparsify.method.selection import Axis, select
from sparsify.method.statistics import InputStatistics
from sparsify.method.weight_pass import Pruned, WeightPass
from sparsify.tensors import zeroed


@dataclass(frozen=True)
class Activation(WeightPass):
    """Prune the floor(out_features · s) output neurons y_i that score least over the calibration tokens.

    Args:
        metric: what a neuron scores: ``mean`` E|y_i|; ``std`` the standard deviation of y_i; ``square`` E y_i²;
            ``correlation`` 1 − max over k ≠ i of |corr(y_i, y_k)|, by which redundant neurons go.
    """

    metric: Literal["mean", "std", "square", "correlation"] = "mean"

    name: ClassVar[str] = "activation"
    summary: ClassVar[str] = "whole output neurons with the least output; one forward"
    when: ClassVar[str] = "to study which neurons matter; to make the model itself smaller take llm-pruner"
    example: ClassVar[str] = "activation:20%,metric=std"
    default_group: ClassVar[Axis] = "input"  # the same rows in every column

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.pattern, NM):
            raise self._refuse(f"metric={self.metric}", "whole output neurons go, not N of M", "Ask for a percentage")
        self._unused(("group", "blocksize", "allocation"), "output neurons of one site compete with each other")

    @property
    def statistics(self) -> tuple[str, ...]:
        moments = {
            "mean": ("output_absolute",),
            "square": ("output_square",),
            "std": ("output_sum", "output_square"),
            "correlation": ("output_sum", "output_gram"),
        }
        return ("squared_norm", *moments[self.metric])

    def prune(self, weight: Tensor, statistics: InputStatistics) -> Pruned:
        scores = self.scores(statistics)
        mask = select(scores.unsqueeze(1).expand_as(weight).contiguous(), self.pattern, self.comparison)
        bias = None if statistics.bias is None else statistics.bias.masked_fill(mask[:, 0], 0)
        return Pruned(zeroed(weight, mask), mask, bias=bias)

    def scores(self, statistics: InputStatistics) -> Tensor:
        """One number per output neuron, [out_features] float64."""
        values, tokens = statistics.values, statistics.tokens
        if self.metric in ("mean", "square"):
            return values["output_absolute" if self.metric == "mean" else "output_square"] / tokens
        mean = values["output_sum"] / tokens
        if self.metric == "std":
            return (values["output_square"] / tokens - mean.square()).clamp(min=0).sqrt()
        covariance = values["output_gram"] / tokens - mean.unsqueeze(1) * mean
        # A neuron that never varies says nothing: correlation 1 with whatever the next one is.
        deviation = covariance.diagonal().clamp(min=0).sqrt()
        silent = deviation <= 1e-6 * deviation.max()
        correlation = (covariance / deviation.unsqueeze(1) / deviation).abs().fill_diagonal_(0)
        correlation = correlation.nan_to_num(0, 0, 0).masked_fill(silent, 0)
        return (1 - correlation.amax(dim=1)).masked_fill(silent, -1)

    def without_data(self) -> WeightPass:
        return _Smallest(self.pattern)


@dataclass(frozen=True)
class _Smallest(WeightPass):
    """Whole output neurons by the norm of their weights, for experts that no token reached."""

    name: ClassVar[str] = "activation"
    default_group: ClassVar[Axis] = "input"

    def prune(self, weight: Tensor, statistics: InputStatistics) -> Pruned:
        scores = weight.float().norm(dim=1, keepdim=True).expand_as(weight).contiguous()
        mask = select(scores, self.pattern, self.comparison)
        return Pruned(zeroed(weight, mask), mask)
