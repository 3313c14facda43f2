"""Refine: what is left of a block's weights is trained until the block gives what the dense model's block gives.

Block by block, as EBFT (2402.12419) and 2510.14444 found enough: the errors of earlier blocks are in a block's input P,
so that it learns to mend them too. With f the pruned block, T what the dense block gives of the dense model's own
stream, per token t:

    error       mean_t ‖f(P)_t − T_t‖² / ‖T_t‖²
    divergence  mean_t KL(softmax z_t ‖ softmax ẑ_t), z the dense model's logits: the last block's

The relative error, for a few tokens (the first, separators) are a thousand times larger than the others and would be
all that a plain one sees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsify.method.divergence import divergence
from sparsify.method.region_pass import RegionPass

# A part of the steps in which the rate rises from nothing.
WARM_UP = 0.1


@dataclass(frozen=True)
class Refine(RegionPass):
    """Fit each block to the dense model's, zeros held, and keep what gains on held-back sequences.

    >>> from sparsify.method.spec import parse_pass, spec_text
    >>> spec_text(parse_pass("refine:epochs=5,rate=0.01,last=kl"))
    'refine:rate=0.01'
    """

    name: ClassVar[str] = "refine"
    summary: ClassVar[str] = "kept weights of each block trained to the dense model's outputs; after any other pass"
    when: ClassVar[str] = "after the last pass that prunes, where quality is worth minutes per block"
    example: ClassVar[str] = "refine:epochs=5"

    @property
    def ladder(self) -> tuple[float, ...]:
        return (0.06, 0.02, 0.006, 0.002) if isinstance(self.rate, str) else (self.rate,)

    def error(self, output: Tensor, target: Tensor, counted: Tensor | None) -> Tensor:
        off, size = (output.float() - target.float()).square().sum(-1), target.float().square().sum(-1)
        return _mean(off / size.clamp_min(torch.finfo(torch.float32).tiny), counted)

    def divergence(self, logits: Tensor, target: Tensor, counted: Tensor | None) -> Tensor:
        flat, taught = logits.flatten(0, -2).unsqueeze(0), target.flatten(0, -2)
        return divergence(flat, lambda row: taught, counted=None if counted is None else counted.reshape(1, -1))

    def share(self, step: int, steps: int) -> float:
        warm = max(1, round(WARM_UP * steps))
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _mean(values: Tensor, counted: Tensor | None) -> Tensor:
    return values.mean() if counted is None else values[counted].mean()
