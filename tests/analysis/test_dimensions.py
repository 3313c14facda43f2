"""Coupled dimensions: operator by operator, proved by one property (a model whose channels are zero gives what a model
without them gives), and what is found in every family."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.zeroed import Net, Reports, check_equality, program_of
from torch import Tensor, nn
from torch.nn import functional as F


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
    "cat with nothing": (lambda x, n: torch.cat([torch.zeros(0), x], -1), 8, 8, 8, {}),
    "variance, its axis kept": (lambda x, n: x * torch.var(x, [1], False, True), 8, 8, 8, {}),
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
    "linear without an axis of outputs": (lambda x, n: x * F.linear(x, n.one.weight[0]).unsqueeze(-1), 8, 8, 8,
                                          {"one": nn.Linear(8, 1)}),
    "matmul with a weight": (lambda x, n: x @ n.other.weight, 8, 4, 8, {"other": nn.Linear(4, 8)}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_operators_do(case: str) -> None:
    torch.manual_seed(0)
    between, width, back, free, more = CASES[case]
    batch = {"0": torch.randn(2, 3, 6)}
    program, dimensions = program_of(Net(between, width, back, **more), batch)
    assert not dimensions.without_rule
    of_first = [any((m.parameter, m.axis) == ("first.weight", 0) for m in g.members) for g in dimensions.groups]
    number = of_first.index(True)
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
def test_what_is_found_in_a_family(name: str, report: Reports) -> None:
    _, found = report(name)
    kinds = Counter((found.kind(g), len(g.free)) for g in found.dimensions.prunable)
    assert kinds == EXPECTED[name]
    assert not found.dimensions.without_rule


def test_query_heads_go_with_their_key_value_head(report: Reports) -> None:
    _, found = report("llama")
    group = next(g for g in found.dimensions.prunable if found.kind(g) == "heads")
    size = {m.parameter.split(".")[-2]: m.positions([1]).tolist() for m in group.members}
    # Two key-value heads of eight columns, each for two query heads that lie side by side.
    assert size["q_proj"] == size["o_proj"] == list(range(16, 32)) and size["k_proj"] == size["v_proj"] == [
        *range(8, 16)
    ]
