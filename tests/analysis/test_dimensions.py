"""Coupled dimensions: operator by operator, then in every family, proved by one property: a model whose channels are
zero gives what a model without them gives."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from analysis.dimensions import check_equality, run
from families import FAMILIES, build, inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify.analysis.dimensions.groups import Dimensions, coupled_dimensions
from sparsify.analysis.dimensions.kinds import roles_of
from sparsify.errors import SpecError, TraceError
from sparsify.frontend.capture import capture
from sparsify.frontend.source import open_source
from sparsify.inspection.dimensions import DimensionReport
from sparsify.ir.program import Program
from sparsify.structure.shrink import shrink


class Net(nn.Module):
    """Two linear layers with something between."""

    def __init__(
        self, between: Callable[[Tensor, nn.Module], Tensor], width: int, back: int, **more: nn.Module
    ) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Linear(6, width), nn.Linear(back, 5), between
        for name, module in more.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x), self))


def heads(x: Tensor, net: nn.Module, n: int = 4) -> Tensor:
    q = x.view(2, 3, n, -1).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(2, 3, -1)


def grouped_heads(x: Tensor, net: Any) -> Tensor:
    q = x.view(2, 3, 4, 4).transpose(1, 2)
    k = net.keys(torch.ones(2, 3, 6)).view(2, 3, 2, 1, 4).expand(2, 3, 2, 2, 4).reshape(2, 3, 4, 4).transpose(1, 2)
    return (torch.softmax(q @ k.transpose(2, 3), -1) @ k).transpose(1, 2).flatten(2)


def elastic(x: Tensor, net: nn.Module) -> Tensor:
    made = torch.zeros(2, 3, 8)
    made[..., :4] = x[..., :4]
    return made + x


# name: (between, width of the first, of the second, free channels, modules between)
CASES: dict[str, tuple[Callable[[Tensor, Any], Tensor], int, int, int, dict[str, nn.Module]]] = {
    "nothing": (lambda x, n: x, 8, 8, 8, {}),
    "unary": (lambda x, n: torch.sigmoid(x).cos() + 1, 8, 8, 8, {}),
    "gate": (lambda x, n: F.silu(x) * n.up(torch.ones(2, 3, 6)), 8, 8, 8, {"up": nn.Linear(6, 8)}),
    "chunk": (lambda x, n: x.chunk(2, -1)[0] * x.chunk(2, -1)[1], 16, 8, 8, {}),
    "split": (lambda x, n: x.split([4, 12], -1)[1], 16, 12, 16, {}),
    "interleaved": (lambda x, n: x[..., ::2] * x[..., 1::2], 16, 8, 8, {}),
    "slice": (lambda x, n: x[..., 2:7], 8, 5, 8, {}),
    "select": (lambda x, n: x[..., 2:] * x.select(-1, 1).unsqueeze(-1), 8, 6, 7, {}),
    "constant index": (lambda x, n: x[..., [-1]] * x[..., :6], 8, 6, 7, {}),
    "cat": (lambda x, n: torch.cat([x, -x, n.up(torch.ones(2, 3, 6))], -1), 8, 20, 12, {"up": nn.Linear(6, 4)}),
    "stack and sum": (lambda x, n: torch.stack([x, x * x], 1).sum(1), 8, 8, 8, {}),
    "heads": (heads, 16, 16, 4, {}),
    "grouped heads": (grouped_heads, 16, 16, 2, {"keys": nn.Linear(6, 8)}),
    "permute": (lambda x, n: x.permute(2, 0, 1).permute(1, 2, 0).unsqueeze(0).squeeze(0), 8, 8, 8, {}),
    "merge with the sequence": (lambda x, n: x.reshape(6, 8).view(2, 3, 8), 8, 8, 8, {}),
    "repeat": (lambda x, n: x.repeat(1, 1, 2), 8, 16, 8, {}),
    "repeat_interleave": (lambda x, n: x.repeat_interleave(2, -1), 8, 16, 8, {}),
    "zeros take any size": (elastic, 8, 8, 8, {}),
    "depth-wise convolution": (lambda x, n: n.conv(x.transpose(1, 2)).transpose(1, 2), 8, 8, 8,
                               {"conv": nn.Conv1d(8, 8, 3, padding=1, groups=8)}),
    "convolution": (lambda x, n: n.conv(x.transpose(1, 2)).transpose(1, 2), 8, 4, 8, {"conv": nn.Conv1d(8, 4, 1)}),
    "einsum": (lambda x, n: torch.einsum("btc,bsc,bsd->btd", x, x, x), 8, 8, 8, {}),
    "where": (lambda x, n: torch.where(x > 0, x, 0.1 * x), 8, 8, 8, {}),
    "matmul with a weight": (lambda x, n: x @ n.other.weight, 8, 4, 8, {"other": nn.Linear(4, 8)}),
}  # fmt: skip


def program_of(module: nn.Module, batch: dict[str, Tensor]) -> tuple[Program, Dimensions]:
    program = capture(open_source(module.eval()), batch)
    return program, coupled_dimensions(program)


@pytest.mark.parametrize("case", CASES)
def test_what_operators_do(case: str) -> None:
    torch.manual_seed(0)
    between, width, back, free, more = CASES[case]
    batch = {"0": torch.randn(2, 3, 6)}
    program, dimensions = program_of(Net(between, width, back, **more), batch)
    assert not dimensions.without_rule
    number = next(i for i, g in enumerate(dimensions.groups)
                  if any(m.parameter == "first.weight" and m.axis == 0 for m in g.members))  # fmt: skip
    group = dimensions.groups[number]
    assert len(group.free) == free and not group.renormalized
    for channels in ([int(group.free[0])], [int(c) for c in group.free[1::2]], [int(c) for c in group.free[:-1]]):
        small = check_equality(program, dimensions, {number: channels}, batch)
        assert small.weights.read("first.weight").shape[0] < width
    everything = {i: [int(c) for c in g.free[::2]] for i, g in enumerate(dimensions.groups) if len(g.free) > 1}
    check_equality(program, dimensions, everything, batch)


PINNED: dict[str, tuple[Callable[[Tensor, Any], Tensor], str]] = {
    "a constant": (lambda x, n: x * torch.arange(8.0), "what is no parameter"),
    "a sort": (lambda x, n: x.sort(-1).values, "sorts its channels"),
    "a maximum": (lambda x, n: x - x.amax(-1, keepdim=True), "compares its channels"),
    "a triangle": (lambda x, n: x.reshape(2, 3, 1, 8).expand(2, 3, 8, 8).tril().sum(2), "compares its positions"),
    "no rule": (lambda x, n: x.flip(-1), "flip has no rule"),
    "a pad": (lambda x, n: F.pad(x[..., 1:], (1, 0)), "pads it"),
    "a look-up": (lambda x, n: x[..., torch.arange(3).repeat(3)[:8]], "looks positions up"),
}


@pytest.mark.parametrize("case", PINNED)
def test_what_is_pinned_says_why(case: str) -> None:
    between, why = PINNED[case]
    _, dimensions = program_of(Net(between, 8, 8), {"0": torch.randn(2, 3, 6)})
    group = next(g for g in dimensions.groups if any(m.parameter == "first.weight" and m.axis == 0 for m in g.members))
    assert bool(group.pinned.any()) and why in str(group.reason)
    assert dimensions.without_rule.keys() == ({"flip"} if case == "no rule" else set())


def test_what_cannot_be_removed_is_refused() -> None:
    program, dimensions = program_of(Net(lambda x, n: x, 8, 8), {"0": torch.randn(2, 3, 6)})
    number = next(i for i, g in enumerate(dimensions.groups) if g.channels == 8)
    last = next(i for i, g in enumerate(dimensions.groups) if g.pinned.all())
    for remove, match in (({number: range(8)}, "nothing would be left"), ({number: [8]}, "8 channels"),
                          ({99: [0]}, "groups"), ({last: [0]}, "returns it|no parameter")):  # fmt: skip
        with pytest.raises(SpecError, match=match):
            shrink(program, dimensions, remove)  # type: ignore[arg-type]
    assert run(shrink(program, dimensions, {}), {"0": torch.ones(2, 3, 6)}).shape == (2, 3, 5)


@cache
def family(name: str) -> tuple[Program, DimensionReport]:
    program = capture(open_source(build(name)), inputs(name))
    return program, DimensionReport(name, coupled_dimensions(program), roles_of(program))


# What each family has in two blocks: (kind, free channels, how many such groups).
EXPECTED = {
    "llama": {("heads", 2): 2, ("channels", 64): 2, ("width", 32): 1},
    "qwen2": {("heads", 2): 2, ("channels", 64): 2, ("width", 32): 1},
    "phi3": {("heads", 2): 2, ("channels", 64): 2, ("width", 32): 1},
    "gpt2": {("heads", 4): 2, ("channels", 128): 2, ("width", 32): 1},
    "gpt_neox": {("heads", 4): 2, ("channels", 64): 2, ("width", 32): 1},
    "falcon": {("heads", 4): 2, ("channels", 128): 2, ("width", 32): 1},
    # Its position bias is a function of the number of heads: none can go.
    "bloom": {("channels", 128): 2, ("width", 32): 1},
    "opt": {("heads", 4): 2, ("channels", 64): 2, ("width", 32): 1, ("channels", 16): 1},
    "mixtral": {("heads", 2): 2, ("experts", 4): 2, ("channels", 64): 2, ("width", 32): 1},
    "gpt_oss": {("heads", 2): 2, ("experts", 4): 2, ("channels", 64): 2, ("width", 32): 1},
    "mamba": {("channels", 64): 2, ("channels", 10): 2, ("width", 32): 1},
    "mamba2": {("heads", 2): 2, ("width", 32): 1},
    "bert": {("heads", 4): 2, ("channels", 64): 2, ("width", 32): 1},
    "vit": {("heads", 4): 2, ("channels", 64): 2, ("width", 32): 1},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_found_in_a_family(name: str) -> None:
    _, report = family(name)
    found = Counter((report.kind(g), len(g.free)) for g in report.dimensions.prunable)
    assert found == EXPECTED[name]
    assert not report.dimensions.without_rule


def test_query_heads_go_with_their_key_value_head() -> None:
    _, report = family("llama")
    group = next(g for g in report.dimensions.prunable if report.kind(g) == "heads")
    size = {m.parameter.split(".")[-2]: m.positions([1]).tolist() for m in group.members}
    # Two key-value heads of eight columns, each for two query heads that lie side by side.
    assert size["q_proj"] == size["o_proj"] == list(range(16, 32)) and size["k_proj"] == size["v_proj"] == [
        *range(8, 16)
    ]


QUICK = ("llama", "gpt2", "falcon")


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f not in QUICK)]
)
def test_a_model_without_channels_is_the_model_with_zeros(name: str) -> None:
    program, report = family(name)
    dimensions, batch = report.dimensions, inputs(name)
    exact = [i for i, g in enumerate(dimensions.groups) if len(g.free) > 1 and not g.renormalized]

    @settings(max_examples=6, deadline=None)
    @given(st.data())
    def drawn(data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(exact), min_size=1, unique=True))
        remove = {}
        for i in chosen:
            free = [int(c) for c in dimensions.groups[i].free]
            remove[i] = data.draw(st.lists(st.sampled_from(free), min_size=1, max_size=len(free) - 1, unique=True))
        check_equality(program, dimensions, remove, batch)

    drawn()


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_the_residual_width_of_a_whole_model(name: str) -> None:
    """Norms divide by another width then, so that it is no model with zeros; but it runs, everywhere narrower."""
    program, report = family(name)
    number, group = next((i, g) for i, g in enumerate(report.dimensions.groups) if report.kind(g) == "width")
    assert group.renormalized
    small = shrink(program, report.dimensions, {number: [int(c) for c in group.free[:8]]})
    assert bool(run(small, inputs(name)).isfinite().all())
    for member in group.members:
        assert small.weights.read(member.parameter).shape[member.axis] == 24


def test_experts_need_as_many_as_a_token_takes() -> None:
    program, report = family("mixtral")
    number = next(i for i, g in enumerate(report.dimensions.groups) if report.kind(g) == "experts")
    small = shrink(program, report.dimensions, {number: [1]})
    assert bool(run(small, inputs("mixtral")).isfinite().all())
    with pytest.raises(TraceError, match="chooses 2 of 1"):
        shrink(program, report.dimensions, {number: [0, 1, 2]})


def test_sentences_json_and_a_graph(folder: Callable[[str], Path], tmp_path: Path) -> None:
    words = [sys.executable, "-m", "sparsify", "inspect", str(folder("llama")), "--dimensions"]
    text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "2 heads: model.layers.0.self_attn.q_proj outputs (16 each), " in text
    assert "64 channels: model.layers.0.mlp.gate_proj outputs, model.layers.0.mlp.up_proj outputs, " in text
    assert "32 channels of the residual width" in text and "pinned: lm_head outputs: the model returns it" in text
    done = subprocess.run(
        [*words, "--json", "--dot", str(tmp_path / "d.dot")], capture_output=True, text=True, check=True
    )
    groups = json.loads(done.stdout)["groups"]
    heads_ = next(g for g in groups if g["kind"] == "heads")
    assert heads_["free"] == 2 and heads_["members"][0]["channel"][:17] == [0] * 16 + [1]
    assert (tmp_path / "d.dot").read_text().startswith("graph dimensions {")
