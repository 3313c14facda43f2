"""GBLM-Pruner's scores by the paper's formula."""

from __future__ import annotations

import pytest
import torch
from support import slow
from torch import nn

from sparsify.errors import SparsifyError, SpecError
from sparsify.method.pattern import NM, Unstructured
from sparsify.method.spec import parse_pass
from sparsify.passes import GBLM
from sparsify.prune.fx_pass import GraphPrune


def test_gblm_scores_are_the_papers() -> None:
    weight, x = slow.problem("random")
    generator = torch.Generator().manual_seed(2)
    gradients = torch.randn(8, *weight.shape, generator=generator) * 1e-3
    values = {"gradient_l2": gradients.square().sum(dim=0).sqrt(), "gradient_l1": gradients.abs().sum(dim=0)}
    stats = slow.statistics(x, **values)
    norms = stats.squared_norm.sqrt()
    for norm in ("l1", "l2"):
        for reduction in ("sum", "mean"):
            g = values[f"gradient_{norm}"]
            if reduction == "mean":
                g = g / 8 if norm == "l1" else g / 8**0.5
            scores = weight.abs().double() * (norms + 100 * g.double())
            order = scores.sort(dim=1, stable=True).indices
            expected = torch.zeros_like(weight, dtype=torch.bool).scatter_(1, order[:, : weight.shape[1] // 2], True)
            ours = GBLM(Unstructured("0.5"), norm=norm, reduction=reduction).prune(weight, stats)  # type: ignore[arg-type]
            assert float((ours.mask == expected).double().mean()) >= 0.999
    # The gradient's share decides: without it the mask is Wanda's.
    tiny = GBLM(NM(2, 4), alpha=1e-12).prune(weight, stats)
    assert torch.equal(tiny.mask, parse_pass("wanda:2:4").prune(weight, stats).mask)
    assert not torch.equal(GBLM(NM(2, 4), alpha=1e6).prune(weight, stats).mask, tiny.mask)


def test_gradients_of_a_bare_graph_are_refused() -> None:
    net = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(SparsifyError, match="no logits"):
        GraphPrune(GBLM(NM(2, 4)), [torch.randn(4, 8)])(net)


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("gblm:50%,alpha=0", "positive"),
    ],
)
def test_contradictory_options_are_refused(spec: str, match: str) -> None:
    with pytest.raises(SpecError, match=match):
        parse_pass(spec)
