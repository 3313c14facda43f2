"""Options off their defaults, against their formulas written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import slow
from support.families import build, inputs
from torch import Tensor, nn

import sparsify
from sparsify.errors import CalibrationError
from sparsify.method.pattern import Unstructured
from sparsify.method.spec import parse_pass
from sparsify.method.statistics import InputStatistics
from sparsify.passes import GBLM, Activation, Wanda


@pytest.mark.parametrize(
    ("norm", "statistic"), [("l2", "squared_norm"), ("l1", "absolute_sum"), ("max", "absolute_max")]
)
def test_wanda_by_each_norm(norm: Any, statistic: str) -> None:
    weight, x = slow.problem("outliers")
    norms = {"l2": x.norm(dim=0), "l1": x.abs().sum(dim=0), "max": x.abs().amax(dim=0)}[norm]
    scores = weight.abs().double() * norms
    order = scores.sort(dim=1, stable=True).indices[:, :32]
    expected = torch.zeros_like(weight, dtype=torch.bool).scatter_(1, order, True)
    method = Wanda(Unstructured("0.5"), norm=norm)
    assert method.statistics == (statistic,)
    assert float((method.prune(weight, slow.statistics(x)).mask == expected).double().mean()) >= 0.999
    with pytest.raises(CalibrationError, match="zero on every calibration token"):
        method.prune(weight, slow.statistics(torch.zeros_like(x)))


@pytest.mark.parametrize("norm", ["l1", "max"])
def test_wanda_by_each_norm_in_a_model(norm: str) -> None:
    """End to end, in two batches: the statistic is that of all tokens."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(16, 8)), torch.randn(40, 16) * torch.rand(16)
    made = sparsify.compile(net, [f"wanda:50%,norm={norm}"], calibration=[x[:20], x[20:]])
    size = x.abs().sum(dim=0) if norm == "l1" else x.abs().amax(dim=0)
    order = (net[0].weight.detach().abs() * size).sort(dim=1, stable=True).indices[:, :8]
    gone = torch.zeros(8, 16, dtype=torch.bool).scatter_(1, order, True)
    assert torch.equal(made.weight("0.weight") == 0, gone)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("alpha", [1.0, 100.0])
def test_gblm_multiplies_by_its_formula(norm: Any, reduction: Any, alpha: float) -> None:
    """n = 9 samples: a sum of squares is divided by them inside the root, a sum outside."""
    squares, gradient = torch.tensor([4.0, 9.0]), torch.tensor([[0.3, 0.6], [0.9, 0.0]])
    stats = InputStatistics({"squared_norm": squares, f"gradient_{norm}": gradient}, tokens=90, sequences=9)
    share = {("sum", "l1"): 1, ("sum", "l2"): 1, ("mean", "l1"): 9, ("mean", "l2"): 3}[reduction, norm]
    found = GBLM(Unstructured("0.5"), norm=norm, reduction=reduction, alpha=alpha).multiplier(stats)
    torch.testing.assert_close(found, torch.tensor([[2.0, 3.0]]) + alpha * gradient / share)


def outputs(**neurons: Tensor) -> InputStatistics:
    """Statistics of [tokens, out_features]."""
    y = torch.stack(list(neurons.values()), dim=1).double()
    values = {
        "output_absolute": y.abs().sum(0),
        "output_sum": y.sum(0),
        "output_square": y.square().sum(0),
        "output_gram": y.t() @ y,
    }
    return InputStatistics(values, len(y), 1)


def test_a_neuron_that_never_varies_goes_first() -> None:
    """By correlation it is worth less than one that repeats another, though it correlates with nothing."""
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randn(2, 64, generator=generator)
    stats = outputs(one=one, twin=2 * one + 1, silent=torch.full((64,), 3.0), two=two, zero=torch.zeros(64))
    scores = Activation(Unstructured("0.4"), metric="correlation").scores(stats)
    assert scores[2] == scores[4] == -1 and scores.isfinite().all()
    assert scores[0] == pytest.approx(0, abs=1e-6) == scores[1] and scores[3] > 0.5
    pruned = Activation(Unstructured("0.4"), metric="correlation").prune(torch.ones(5, 3), stats)
    assert pruned.mask.all(dim=1).tolist() == [False, False, True, False, True]


def test_experts_of_activation_that_no_token_reached_lose_their_smallest_neurons() -> None:
    model = build("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
    result = sparsify.compile(model, ["activation:25%"], calibration=[inputs("mixtral", rows=2)])
    site = next(s for s in result.runs[0].sites if s.name.endswith("0.mlp.experts.down_proj"))
    assert len(site.without_data) == 2
    for expert in site.without_data:
        before = model.model.layers[0].mlp.experts.down_proj.data[expert]
        after = result.weight(site.parameter)[expert]
        gone = before.norm(dim=1).argsort(stable=True)[:8]
        assert set((after == 0).all(dim=1).nonzero().flatten().tolist()) == set(gone.tolist())
        assert torch.equal(after[after.any(dim=1)], before[after.any(dim=1)])


@pytest.mark.parametrize("group", ["output", "input", "layer"])
@pytest.mark.parametrize("blocksize", [1, 3])
@pytest.mark.parametrize("count", ["floor", "exact", "total"])
def test_comparison_groups_of_every_kind(group: str, blocksize: int, count: str) -> None:
    """Each group loses its own smallest, by loops over the matrix."""
    if group == "layer" and blocksize > 1:
        return
    weight, x = slow.problem("random", rows=7, columns=10)
    pruned = parse_pass(f"wanda:29%,group={group},blocksize={blocksize},count={count}").prune(
        weight, slow.statistics(x)
    )
    scores = weight.abs().double() * x.norm(dim=0)
    groups: dict[int, list[tuple[float, int, int]]] = {}
    for i in range(7):
        for j in range(10):
            at = {"output": i // blocksize, "input": j // blocksize, "layer": 0}[group]
            groups.setdefault(at, []).append((float(scores[i, j]), i, j))
    gone, seen = set(), 0
    for at in sorted(groups):
        size = len(groups[at])
        share = {"floor": int(size * 0.29), "exact": size * 29 // 100}.get(count)
        if share is None:
            share = (seen + size) * 29 // 100 - seen * 29 // 100
        seen += size
        gone |= {(i, j) for _, i, j in sorted(groups[at])[:share]}
    assert {(i, j) for i, j in pruned.mask.nonzero().tolist()} == gone
