"""Convolutions as linear sites: rows times matrix is the convolution, whatever its kernel."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.families import build, inputs
from torch import Tensor, fx, nn

import sparsify
from sparsify.analysis.linear import find_sites
from sparsify.frontend.capture import capture
from sparsify.frontend.matching import weights_of_module
from sparsify.frontend.source import open_source
from sparsify.ir.graph import empty_root
from sparsify.ir.program import Program


def by_hand(net: nn.Conv1d | nn.Conv2d, x: Tensor) -> Program:
    """The program that ``nn.Sequential(net)`` is, without the third of a second that a capture takes."""
    graph, held = fx.Graph(), {"0.weight": net.weight}
    value, weight = graph.placeholder("x"), graph.get_attr("0.weight")
    value.meta = {"val": x.to("meta"), "input": "0"}
    weight.meta = {"val": net.weight.detach().to("meta")}
    operator = torch.ops.aten.conv1d.default if isinstance(net, nn.Conv1d) else torch.ops.aten.conv2d.default
    more = [list(net.stride), list(net.padding), list(net.dilation), net.groups]  # type: ignore[arg-type]
    node = graph.call_function(operator, (value, weight, None, *more))
    node.meta = {"val": net(x).detach().to("meta")}
    graph.output((node,))
    made = Program(fx.GraphModule(empty_root(held), graph), weights_of_module(nn.Sequential(net)), {})
    made.verify()
    return made


def convolution(
    dimensions: int, kernel: int, stride: int, padding: int, dilation: int, depthwise: bool
) -> tuple[nn.Conv1d | nn.Conv2d, Tensor]:
    kind = nn.Conv1d if dimensions == 1 else nn.Conv2d
    net = kind(6, 6 if depthwise else 4, kernel, stride, padding, dilation, groups=6 if depthwise else 1, bias=False)
    return net, torch.randn(2, 6, *[9] * dimensions)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 2),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(1, 2),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_rows_times_matrix_is_the_convolution(
    dimensions: int, kernel: int, stride: int, padding: int, dilation: int, depthwise: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    net, x = convolution(dimensions, kernel, stride, padding, dilation, depthwise)
    sites, opaque = find_sites(by_hand(net, x))
    assert not opaque and len(sites) == 1
    site = sites[0]
    matrices = site.matrices(net.weight.detach())
    assert torch.equal(site.layout(matrices, net.weight), net.weight)
    expected = net(x)
    if site.window is None:
        assert kernel == stride == 1 and padding == 0 and not depthwise
        return
    rows = site.window.rows(x)
    found = torch.einsum("cpk,ck->pc", rows, matrices[:, 0]) if depthwise else rows @ matrices[0].T
    torch.testing.assert_close(found, expected.flatten(2).transpose(1, 2).flatten(0, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "drawn", [(1, 1, 1, 0, 1, False), (1, 4, 2, 1, 2, True), (2, 3, 1, 2, 1, False), (2, 2, 3, 0, 1, True)]
)
def test_a_captured_convolution_is_the_one_made_by_hand(drawn: Any) -> None:
    """What the property above is shown is what torch.export gives."""
    net, x = convolution(*drawn)
    one, other = (find_sites(p)[0][0] for p in (by_hand(net, x), capture(open_source(nn.Sequential(net)), {"0": x})))
    different = {f.name for f in fields(one) if getattr(one, f.name) != getattr(other, f.name)}
    assert different == {"node", "activation"}


@pytest.mark.parametrize("spec", ["wanda:2:4", "sparsegpt:2:4", "apt:50%", "twin:2:4", "alps:2:4", "magnitude:2:4"])
def test_a_depthwise_convolution_when_it_is_named(spec: str) -> None:
    """One matrix [1, 4] per channel, each with the statistics of its own channel."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(8, 8, 4, padding=3, groups=8), nn.ReLU(), nn.Conv1d(8, 8, 1))
    x = torch.randn(4, 8, 20)
    result = sparsify.compile(net, [spec], calibration=[x], only=["0", "2"])
    for site in result.runs[0].sites:
        kept = result.weight(site.parameter).flatten(1) != 0
        # Each row is a group for 50%, and each four of it for N:M.
        groups = kept if "%" in spec else kept.view(-1, 4)
        assert (groups.sum(dim=1) == groups.shape[1] // 2).all(), site.name
        assert site.kept == 0.5 and site.error is not None and 0 < site.error < 1
    if spec == "wanda:2:4":
        padded = nn.functional.pad(x, (3, 3))
        seen = torch.stack([padded[:, :, i : i + 23] for i in range(4)]).permute(2, 0, 1, 3).flatten(2)
        scores = net[0].weight.detach()[:, 0].abs() * seen.norm(dim=2)
        kept = result.weight("0.weight")[:, 0] != 0
        assert all(row[k].min() > row[~k].max() for row, k in zip(scores, kept, strict=True))


def test_kernels_stay_dense_unless_they_are_named() -> None:
    model = build("convnext")
    result = sparsify.compile(model, ["wanda:2:4"], calibration=[inputs("convnext")])
    reasons = {s.node: s.reason for s in result.runs[0].skipped}
    assert any("dwconv" in name and "convolution" in reason for name, reason in reasons.items())
    named = sparsify.compile(model, ["wanda:50%"], calibration=[inputs("convnext")], only=["*.dwconv"])
    assert all("dwconv" in site.name and 0.4 < site.kept < 0.6 for site in named.runs[0].sites)


def test_wanda_of_a_kernel_by_hand() -> None:
    """|W|·‖X‖ where X is what each place of the kernel sees, padding included."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(2, 4, 2, padding=1)), torch.randn(3, 2, 5, 5)
    made = sparsify.compile(net, ["wanda:50%"], calibration=[x], only=["0"]).model
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    seen = torch.stack([padded[:, c, i : i + 6, j : j + 6] for c in range(2) for i in range(2) for j in range(2)])
    scores = net[0].weight.detach().flatten(1).abs() * seen.flatten(1).norm(dim=1)
    kept = made[0].weight.detach().flatten(1) != 0
    for row, mask in zip(scores, kept, strict=True):
        assert int(mask.sum()) == 4 and row[mask].min() >= row[~mask].max()
