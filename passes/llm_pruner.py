"""LLM-Pruner: remove whole channels and heads, the least important of each group (Ma et al. 2023, 2305.11627).

Importance of a weight w with gradient g of the loss, and F the mean of g² over samples (algorithms.md, section 9.2):

    taylor-vector   |Σ w g|                     over a position's row or column: equation 3 of the paper
    taylor-first    Σ |w g|                     element by element, equation 5's first term
    taylor-second   Σ |w F w|
    taylor-mix      Σ |w g − ½ w F w|           equation 5
    l1, l2          Σ |w|, Σ w²
    random

The parameters of a group are combined position by position by ``group`` (a column of a head in one with that in the
others), and the columns of a head are summed then. Unlike the official code: query heads are summed with the key-value
head that really serves them, and ``group`` counts for l1 and l2 too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sparsify.method.structural_pass import Part, StructuralPass

Importance = Literal["taylor-first", "taylor-second", "taylor-mix", "taylor-vector", "l1", "l2", "random"]
Reduction = Literal["sum", "mean", "max", "product", "first", "last"]


@dataclass(frozen=True)
class LLMPruner(StructuralPass):
    """Remove the channels and heads whose weights matter least to the loss.

    Attributes:
        importance: of a weight: of first or second order in the loss's gradient, both (``taylor-mix``), the sums of
            rows (``taylor-vector``), or without gradients ``l1``, ``l2``, ``random``.
        group: how the parameters of a group of channels are combined: ``sum``, ``mean``, ``max``, ``product``, or that
            of the ``first`` or ``last`` parameter alone.
    """

    importance: Importance = "taylor-first"
    group: Reduction = "sum"

    name: ClassVar[str] = "llm-pruner"
    summary: ClassVar[str] = "whole heads and channels of the least importance; the model gets smaller"
    when: ClassVar[str] = (
        "for speed and memory everywhere, without sparse kernels; give it first, and run sparsify tune after"
    )
    example: ClassVar[str] = "llm-pruner:25%,importance=taylor-mix"

    @property
    def statistics(self) -> tuple[str, ...]:
        needed = {"taylor-second": ("gradient_l2",), "taylor-mix": ("gradient", "gradient_l2")}
        return needed.get(self.importance, ("gradient",) if self.importance.startswith("taylor") else ())

    def scores(self, parts: Sequence[Part], channels: int, seed: int) -> Tensor:
        if self.importance == "random":
            return torch.rand(channels, generator=torch.Generator().manual_seed(seed))
        found = []
        for part in parts:
            each = torch.zeros(channels * part.places, dtype=torch.float64)
            each.index_add_(0, part.channel * part.places + part.place, self._positions(part).double())
            found.append(each.view(channels, part.places))
        every = torch.stack(found)
        if self.group == "product":
            # By logarithms, for the product of a dozen small numbers is no number; and its root, which orders alike.
            return (every.clamp(min=1e-300).log().sum(0).logsumexp(1) / len(every)).exp()
        combined = {
            "sum": every.sum(0),
            "mean": every.mean(0),
            "max": every.amax(0),
            "first": every[0],
            "last": every[-1],
        }[self.group]
        return combined.sum(1)

    def _positions(self, part: Part) -> Tensor:
        """[positions]: the importance of each row of the part."""
        w, g, f = part.weight, part.gradient, part.fisher
        if self.importance == "l1":
            return w.abs().sum(1)
        if self.importance == "l2":
            return w.square().sum(1)
        if self.importance == "taylor-second":
            assert f is not None, "asked for by `statistics`"
            return (w * f * w).abs().sum(1)
        assert g is not None, "asked for by `statistics`"
        if self.importance == "taylor-vector":
            return (w * g).sum(1).abs()
        if self.importance == "taylor-first":
            return (w * g).abs().sum(1)
        assert f is not None, "asked for by `statistics`"
        return (w * g - 0.5 * w * f * w).abs().sum(1)
