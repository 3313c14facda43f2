"""Linear layers in groups: one weight whose output neurons are split, each part with its own part of the input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import sparsify
from sparsify.analysis.linear import find_sites
from sparsify.backends.packed.plan import _unfit_site
from sparsify.frontend.capture import capture
from sparsify.frontend.source import open_source


class Grouped(nn.Module):
    """DeepSeek-V4's output projection: each group of heads by output neurons of its own, one weight for all groups."""

    def __init__(self, out: int = 6) -> None:
        super().__init__()
        self.first, self.o_a, self.o_b = nn.Linear(8, 16), nn.Linear(8, out, bias=False), nn.Linear(out, 4)

    def forward(self, x: Tensor) -> Tensor:
        each = self.first(x).reshape(-1, 2, 8).transpose(0, 1)
        weight = self.o_a.weight.view(2, -1, 8).transpose(1, 2)
        return self.o_b(torch.bmm(each, weight).transpose(0, 1).reshape(*x.shape[:-1], -1))


def test_a_linear_layer_in_groups() -> None:
    """Its masks are those of each row by the part of the input that the row's own group reads."""
    torch.manual_seed(0)
    net, x = Grouped().eval(), torch.randn(32, 8) * torch.arange(1, 9)
    sites, opaque = find_sites(capture(open_source(net), {"0": x}))
    site = next(site for site in sites if site.name == "o_a")
    assert not opaque and site.grouped and (site.experts, site.shape) == (2, (3, 8))
    assert torch.equal(site.layout(site.matrices(net.o_a.weight), net.o_a.weight), net.o_a.weight)
    pruned = sparsify.compile(net, ["wanda:2:4"], calibration=[x], schedule="dense").model
    parts = net.first(x).reshape(32, 2, 8)
    scores = torch.cat([net.o_a.weight[3 * g : 3 * g + 3].abs() * parts[:, g].norm(dim=0) for g in range(2)])
    kept = torch.zeros(6, 2, 4, dtype=torch.bool)
    kept.scatter_(2, scores.view(6, 2, 4).topk(2, dim=2).indices, True)
    assert torch.equal(pruned.o_a.weight != 0, kept.view(6, 8))
    assert "in groups" in str(_unfit_site(site))


def test_other_splits_of_a_weight_are_no_site() -> None:
    class Split(Grouped):
        def forward(self, x: Tensor) -> Tensor:
            # Groups of inputs, which every output neuron sums up.
            weight = self.o_a.weight.view(6, 2, 4).permute(1, 2, 0)
            return torch.bmm(x.reshape(-1, 2, 4).transpose(0, 1), weight).sum(0)

    _, opaque = find_sites(capture(open_source(Split().eval()), {"0": torch.randn(32, 8)}))
    assert [o.parameters for o in opaque] == [("o_a.weight",)] and "split into groups" in opaque[0].reason
