"""Twin: each site is fitted to the dense model, and what earlier sites lost is repaired."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import slow
from support.chain import Chain
from support.families import build, inputs
from torch import Tensor, nn

import sparsify
from sparsify.errors import SparsifyError, SpecError
from sparsify.method.spec import parse_pass
from sparsify.prune.fx_pass import GraphPrune


def chain_inputs(chain: Chain, x: Tensor) -> list[tuple[nn.Linear, Tensor]]:
    """Every linear with its input, in order."""
    found = []
    with torch.no_grad():
        for layer in chain.layers:
            hidden = layer[0](x).relu()
            found += [(layer[0], x), (layer[2], hidden)]
            x = x + layer[2](hidden)
    return found


@pytest.mark.parametrize("spec", ["twin:2:4,mask=wanda", "twin:50%", "sparsegpt:2:4,target=dense,blend=1"])
def test_every_site_is_fitted_to_the_dense_model_by_hand(spec: str) -> None:
    """Layer by layer: statistics from plain forwards of the pruned and of the dense chain, then the pass itself."""
    chain, x = Chain(), torch.randn(96, 16)
    made = sparsify.compile(chain, [spec], calibration=[x]).model
    running = copy.deepcopy(chain)
    for index, (_, dense) in enumerate(chain_inputs(chain, x)):
        linear, pruned = chain_inputs(running, x)[index]
        stats = slow.statistics(pruned.double(), dense.double(), sequences=96)
        linear.weight.data = parse_pass(spec).prune(linear.weight.data, stats).weight
    for (ours, _), (expected, _) in zip(chain_inputs(made, x), chain_inputs(running, x), strict=True):
        assert float(((ours.weight == 0) == (expected.weight == 0)).float().mean()) >= 0.99
        torch.testing.assert_close(ours.weight, expected.weight, rtol=1e-3, atol=1e-3)


def test_twin_repairs_what_earlier_sites_lost() -> None:
    """Against the same mask and solver without the dense stream: the chain's output is nearer to the dense one."""
    chain, x = Chain(), torch.randn(512, 16)
    with torch.no_grad():
        dense = chain(x)
        lost = {
            spec: float((sparsify.compile(chain, [spec], calibration=[x]).model(x) - dense).norm() / dense.norm())
            for spec in ("wanda:2:4", "wanda:2:4,update=exact", "wanda:2:4,update=exact,target=dense,blend=1")
        }
    ranked = sorted(lost, key=lost.__getitem__, reverse=True)
    assert ranked == list(lost), lost


@pytest.mark.parametrize("target", ["dense", "pruned"])
def test_zeros_of_an_earlier_pass_are_refitted_to_the_model_as_given(target: str) -> None:
    """Two passes, mask then fit, are the one pass that does both."""
    chain, x = Chain(), torch.randn(256, 16)
    two = sparsify.compile(
        chain, ["magnitude:2:4", f"apt:2:4,mask=zeros,target={target},dead=keep"], calibration=[x]
    ).model
    one = sparsify.compile(chain, [f"magnitude:2:4,update=exact,target={target},dead=keep"], calibration=[x]).model
    for name, weight in one.named_parameters():
        torch.testing.assert_close(two.get_parameter(name), weight)
    with pytest.raises(SparsifyError, match="Prune before it"):
        sparsify.compile(chain, ["twin:2:4,mask=zeros"], calibration=[x])


def test_schedules() -> None:
    chain, x = Chain(), torch.randn(64, 16)
    assert sparsify.compile(chain, ["twin:2:4"], calibration=[x], schedule="block").runs[0].kept == 0.5
    with pytest.raises(SparsifyError, match="one stream"):
        sparsify.compile(chain, ["twin:2:4"], calibration=[x], schedule="dense")


@pytest.mark.first(2)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_experts_are_fitted_by_the_tokens_that_both_models_send(family: str) -> None:
    model, batch = build(family), inputs(family, rows=16)
    with torch.no_grad():
        dense = model(**batch, use_cache=False).logits
        lost = {}
        for spec in ("wanda:2:4", "twin:2:4"):
            made = sparsify.compile(model, [spec], calibration=[batch]).model
            lost[spec] = float((made(**batch, use_cache=False).logits - dense).norm())
    assert lost["twin:2:4"] < lost["wanda:2:4"]


def test_twin_is_apt_where_nothing_was_pruned_before() -> None:
    weight, inputs = slow.problem("random")
    stats = slow.statistics(inputs, inputs)
    twin = parse_pass("twin:2:4").prune(weight, stats)
    apt = parse_pass("apt:2:4,mask=alps").prune(weight, stats)
    assert torch.equal(twin.mask, apt.mask) and slow.close(twin.weight, apt.weight.double(), 1e-6)


def test_in_a_pass_manager() -> None:
    from torch.fx.passes.infra.pass_manager import PassManager

    chain, x = Chain(), torch.randn(64, 16)
    graph: Any = PassManager([GraphPrune(parse_pass("twin:2:4"), [x])])(torch.fx.symbolic_trace(chain)).graph_module
    made = sparsify.compile(chain, ["twin:2:4"], calibration=[x]).model
    torch.testing.assert_close(graph(x), made(x))


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("twin:2:4,target=pruned", "fits to the dense"),
        ("twin:2:4,blend=0", r"\(0, 1\]"),
    ],
)
def test_contradictory_options_are_refused(spec: str, match: str) -> None:
    with pytest.raises(SpecError, match=match):
        parse_pass(spec)
