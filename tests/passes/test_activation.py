"""Activation pruning: whole output neurons, their bias with them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsify
from sparsify.errors import SpecError
from sparsify.method.pattern import Unstructured
from sparsify.method.spec import parse_pass
from sparsify.passes import Activation


def test_activation_pruning_removes_whole_neurons_and_their_bias() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 4))
    x = torch.randn(256, 16)
    with torch.no_grad():
        net[0].weight[3] = net[0].weight[7] * 2  # redundant
        net[0].bias[3] = 5
        y = net[0](x).double()
    expected = {
        "mean": y.abs().mean(dim=0),
        "square": y.square().mean(dim=0),
        "std": y.std(dim=0, correction=0),
        "correlation": 1 - (torch.corrcoef(y.T) - torch.eye(12)).abs().amax(dim=1),
    }
    for metric, scores in expected.items():
        made = sparsify.compile(net, [f"activation:25%,metric={metric}"], calibration=[x], only=["0"]).model
        gone = scores.argsort()[:3]
        assert set((made[0].weight == 0).all(dim=1).nonzero().flatten().tolist()) == set(gone.tolist()), metric
        assert not made[0].bias[gone].any() and int((made[0].bias != 0).sum()) == 9
        assert torch.equal(made[1].weight, net[1].weight)
    assert Activation(Unstructured("0.5")).statistics == ("squared_norm", "output_absolute")


def test_the_pruned_bias_is_felt_by_what_follows() -> None:
    """The next site is measured behind the neuron that went."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    x = torch.randn(64, 8)
    made = sparsify.compile(net, ["activation:50%,metric=mean"], calibration=[x]).model
    with torch.no_grad():
        second = made[0](x) @ net[1].weight.T + net[1].bias
    gone = second.abs().mean(dim=0).argsort()[:4]
    assert set((made[1].weight == 0).all(dim=1).nonzero().flatten().tolist()) == set(gone.tolist())


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("activation:2:4", "whole output neurons"),
        ("activation:50%,group=layer", "compete with each other"),
    ],
)
def test_contradictory_options_are_refused(spec: str, match: str) -> None:
    with pytest.raises(SpecError, match=match):
        parse_pass(spec)
