"""The scores of gradient pruning by their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import slow

from sparsify.method.pattern import Unstructured
from sparsify.passes import Gradient


@pytest.mark.parametrize("metric", ["snip", "movement", "platon", "l1", "l2"])
def test_gradient_metrics(metric: Any) -> None:
    weight, x = slow.problem("random")
    generator = torch.Generator().manual_seed(2)
    g = torch.randn(weight.shape, generator=generator)
    stats = slow.statistics(x, gradient=g, gradient_platon=g.abs(), gradient_l1=g.abs(), gradient_l2=g.abs())
    scores = {
        "snip": (weight * g).abs(),
        "movement": -weight * g,
        "platon": weight**2 * g.abs(),
        "l1": (weight * g).abs(),
        "l2": (weight * g).abs(),
    }[metric]
    pruned = Gradient(Unstructured("0.5"), metric=metric).prune(weight, stats)
    assert scores[pruned.mask].max() <= scores[~pruned.mask].min()
    assert int(pruned.mask.sum()) == weight.numel() // 2
