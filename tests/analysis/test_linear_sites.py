from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import FAMILIES, inputs
from torch import Tensor, fx, nn

from sparsify.analysis.flow import Flow
from sparsify.analysis.linear import block_of, find_sites, group_by_input
from sparsify.calibration.activations import ActivationStore
from sparsify.calibration.interpreter import Interpreter, Region
from sparsify.frontend.capture import capture
from sparsify.frontend.source import open_source
from sparsify.ir.program import Program

# Parameters of two or more dimensions that no linear site reads, and why: all others must be sites.
NOT_SITES = {
    "embed", "wte", "wpe", "shared", "position", "token_type", "relative_attention_bias", "conv1d", "dwconv",
    "patch_embeddings", "downsampling_layer", "A_log", "cls_token", "gate_up_proj_bias", "down_proj_bias",
}  # fmt: skip


@pytest.mark.first(8)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_every_family_is_a_site_or_named(
    family: str, folder: Callable[[str], Path], captured: Callable[[str], Program]
) -> None:
    source = open_source(folder(family))
    sites, opaque = find_sites(captured(family))
    found = {site.parameter for site in sites} | {p for o in opaque for p in o.parameters}
    for name, parameter in source.module.named_parameters():
        if parameter.dim() >= 2 and source.weights.canonical(name) not in found:
            assert any(word in name for word in NOT_SITES), name
    for site in sites:
        weight = source.weights.read(site.parameter)
        matrices = site.matrices(weight)
        assert matrices.shape == (site.experts, *site.shape)
        assert torch.equal(site.layout(matrices, weight), weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_site_computes_what_it_says(family: str, captured: Callable[[str], Program]) -> None:
    """The node's output is its activation times the site's (out, in) view, plus at most a bias."""
    program = captured(family)
    plain = {site.node: site for site in find_sites(program)[0] if site.expert_axis is None}
    whole = Flow.of(program)
    end = len(whole.order)
    flow = whole.holding({site.activation: [end] for site in plain.values()})
    seen: dict[fx.Node, tuple[Tensor, Tensor]] = {}

    def check(index: int, node: fx.Node, values: Mapping[fx.Node, Any]) -> None:
        seen[node] = (values[plain[node].activation].clone(), values[node].clone())

    with ActivationStore(1 << 30) as store, torch.no_grad():
        runner = Interpreter(program, flow, [inputs(family)], store, torch.device("cpu"))
        runner.run_region(Region(0, end, end), watch=set(plain), on_value=check)
    assert seen.keys() == plain.keys() and seen
    for node, (x, y) in seen.items():
        site = plain[node]
        weight = site.matrices(program.weights.read(site.parameter))[0]
        rows = site.window.rows(x) if site.window else x.movedim(site.feature_dim, -1).reshape(-1, site.shape[1])
        out = y.movedim(site.feature_dim, -1).reshape(-1, site.shape[0])
        rest = out - rows @ weight.t()
        torch.testing.assert_close(rest, rest[:1].expand_as(rest), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("family", "groups"),
    [
        ("llama", [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]),
        ("opt", [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]]),
        ("gpt2", [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]]),
        ("falcon", [["query_key_value", "dense_h_to_4h"], ["dense"], ["dense_4h_to_h"]]),
        ("phi3", [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]]),
        ("mixtral", [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate"], ["gate_up_proj"], ["down_proj"]]),
        ("mamba", [["in_proj"], ["x_proj"], ["dt_proj"], ["out_proj"]]),
        ("bert", [["query", "key", "value"], ["dense"], ["dense"], ["dense"]]),
        ("convnext", [["dwconv"], ["pwconv1"], ["pwconv2"]]),
    ],
)
def test_sites_that_read_one_activation_are_one_group(
    family: str, groups: list[list[str]], captured: Callable[[str], Program]
) -> None:
    sites, _ = find_sites(captured(family))
    first = next(s.block for s in sites if s.block)
    found = [g for g in group_by_input(sites) if g.block == first]
    assert [[s.name.rpartition(".")[2] for s in g.sites] for g in found] == groups


def test_t5_keys_and_values_of_every_decoder_block_read_the_encoder(captured: Callable[[str], Program]) -> None:
    sites, _ = find_sites(captured("t5"))
    cross = [g for g in group_by_input(sites) if "EncDecAttention.k" in g.name]
    assert len(cross) == 2 and cross[0].activation is cross[1].activation


def test_stacked_experts_and_routers(captured: Callable[[str], Program]) -> None:
    sites, _ = find_sites(captured("mixtral"))
    by_name = {s.name.removeprefix("model.layers.0.mlp."): s for s in sites}
    assert by_name["gate"].router and not by_name["experts.gate_up_proj"].router
    assert by_name["experts.gate_up_proj"].experts == 4 and by_name["experts.gate_up_proj"].shape == (128, 32)


class Layouts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 4, 1)
        self.wide = nn.Conv2d(4, 4, 3, padding=1)
        self.deep = nn.Conv2d(4, 4, 1, groups=2)
        self.strided = nn.Conv2d(4, 8, 1, stride=2)
        self.right = nn.Parameter(torch.randn(8, 5))
        self.left = nn.Parameter(torch.randn(3, 5))
        self.scaled = nn.Parameter(torch.randn(3, 3))
        self.signed = nn.Parameter(torch.randn(3, 3))
        self.stack = nn.Parameter(torch.randn(2, 3, 7))
        self.rnn = nn.GRU(7, 7, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.strided(self.deep(self.wide(self.conv(x))))
        y = y.flatten(2).transpose(1, 2) @ self.right
        y = (self.left @ y.transpose(1, 2)).transpose(1, 2)
        y = y @ (self.scaled * 2)
        y = y @ self.signed.exp()
        y = torch.bmm(torch.stack([y[0], y[0]]), self.stack)
        return self.rnn(y)[0]


def test_layouts_that_are_sites_and_those_that_are_named() -> None:
    sites, opaque = find_sites(capture(open_source(Layouts().eval()), {"0": torch.randn(2, 6, 4, 4)}))
    shapes = {s.parameter: (s.shape, s.out_axis, s.in_axis, s.expert_axis, s.feature_dim) for s in sites}
    assert shapes == {
        "conv.weight": ((4, 6), 0, 1, None, -3),
        "wide.weight": ((4, 36), 0, 1, None, 1),
        "strided.weight": ((8, 4), 0, 1, None, 1),
        "right": ((5, 8), 1, 0, None, -1),
        "left": ((3, 5), 0, 1, None, -2),
        "stack": ((7, 3), 2, 1, 0, -1),
        "scaled": ((3, 3), 1, 0, None, -1),
    }
    reasons = {o.parameters[0]: o.reason for o in opaque}
    assert "2 groups" in reasons["deep.weight"]
    assert "computed with before" in reasons["signed"]
    assert [s.parameter for s in sites if s.scaled] == ["scaled"]
    assert "gru" in next(r for p, r in reasons.items() if p.startswith("rnn."))


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.11.mlp.up_proj.weight", "model.layers.11"),
        ("transformer.h.0.attn.c_attn.weight", "transformer.h.0"),
        ("encoder.block.0.layer.1.DenseReluDense.wi.weight", "encoder.block.0"),
        ("convnext.encoder.stages.1.layers.2.pwconv1.weight", "convnext.encoder.stages.1.layers.2"),
        ("model.layers.0.mlp.experts.3.w1.weight", "model.layers.0"),
        ("lm_head.weight", None),
        ("0.weight", None),
    ],
)
def test_blocks_by_name(name: str, block: str | None) -> None:
    assert block_of(name) == block
