"""Two streams side by side: what the engine measures, and what a pass fitted to the dense model gets."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, inputs
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "passes"))
import slow

import sparsify
from sparsify.calibration.streams import paired
from sparsify.errors import CalibrationError, SparsifyError
from sparsify.method.spec import parse_pass


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


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
    ).model  # fmt: skip
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


def test_little_memory_changes_nothing() -> None:
    model, batch = build("llama"), inputs("llama", rows=4)
    one = sparsify.compile(model, ["twin:2:4"], calibration=[batch])
    other = sparsify.compile(model, ["twin:2:4"], calibration=[batch], memory=3000)
    for target in one.runs[0].targets:
        assert torch.equal(one.weight(target.parameter), other.weight(target.parameter))


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


def test_rows_are_paired_by_expert_and_token() -> None:
    """Expert 0 sees tokens 0, 2 pruned and 2, 3 dense; expert 1 sees 1, 3 and 0, 1."""
    pruned = torch.tensor([[0.0], [2.0], [1.0], [3.0]])
    dense = torch.tensor([[12.0], [13.0], [20.0], [21.0]])
    tokens, other = torch.tensor([0, 2, 1, 3]), torch.tensor([2, 3, 0, 1])
    ends = torch.tensor([2, 4])
    found = paired("experts", (pruned, ends, tokens), (dense, ends, other))
    assert found.flatten().tolist() == [0.0, 12.0, 21.0, 3.0]
    with pytest.raises(CalibrationError, match="traced back"):
        paired("experts", (pruned, ends, None), (dense, torch.tensor([1, 4]), None))


def test_padding_is_left_out_of_both_streams() -> None:
    model = build("llama")
    ids = inputs("llama", rows=2)["input_ids"]
    padded = {
        "input_ids": torch.cat([ids, torch.full((2, 4), 5)], dim=1),
        "attention_mask": torch.cat([torch.ones(2, 16), torch.zeros(2, 4)], dim=1).long(),
    }
    one = sparsify.compile(model, ["twin:2:4,mask=wanda"], calibration=[{"input_ids": ids}])
    other = sparsify.compile(model, ["twin:2:4,mask=wanda"], calibration=[padded])
    for target in one.runs[0].targets:
        torch.testing.assert_close(one.weight(target.parameter), other.weight(target.parameter), rtol=1e-3, atol=1e-4)


def test_in_a_pass_manager() -> None:
    from torch.fx.passes.infra.pass_manager import PassManager

    chain, x = Chain(), torch.randn(64, 16)
    graph: Any = PassManager([parse_pass("twin:2:4").bind([x])])(torch.fx.symbolic_trace(chain)).graph_module
    made = sparsify.compile(chain, ["twin:2:4"], calibration=[x]).model
    torch.testing.assert_close(graph(x), made(x))
