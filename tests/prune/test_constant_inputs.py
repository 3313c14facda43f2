"""Layers that read what no batch changes (learned queries, tables of positions) are pruned, and counted as others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.reference import _mask
from torch import Tensor, nn

import sparsify

SCHEDULES = ("layer", "block", "dense")


class Block(nn.Module):
    """``q`` reads the tokens and the latents; ``inner`` and ``outer`` read a table, ``empty`` zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(6, 8))
        self.inner, self.outer, self.q = nn.Linear(8, 16), nn.Linear(16, 8, bias=False), nn.Linear(8, 8)
        self.empty, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        bias = self.outer(self.inner(self.table).relu()).mean(0)
        q, k = self.q(x), self.q(latents.expand(len(x), -1, -1))
        zeros = torch.zeros_like(latents).expand(len(x), -1, -1)
        mixed: Tensor = (q @ k.transpose(1, 2)).softmax(-1) @ (k + self.empty(zeros))
        return x + self.out(mixed + bias)


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(3 * torch.randn(1, 4, 8))
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, self.latents)
        return x


def made() -> tuple[Reader, list[Tensor]]:
    torch.manual_seed(0)
    return Reader().eval(), [torch.randn(2, 5, 8) for _ in range(3)]


def compiled(schedule: Any) -> tuple[Any, Reader, list[Tensor]]:
    model, batches = made()
    return sparsify.compile(model, ["wanda:2:4"], calibration=batches, schedule=schedule), model, batches


def test_masks_are_those_of_hooks() -> None:
    result, model, batches = compiled("dense")
    sums: dict[str, Tensor] = {}
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear):

            def measure(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                sums[name] = sums.get(name, 0) + args[0].reshape(-1, args[0].shape[-1]).square().sum(0)

            part.register_forward_pre_hook(measure)
    with torch.no_grad():
        for x in batches:
            model(x)
    assert {site.name for site in result.runs[0].sites} == {name for name in sums if not name.endswith("empty")}
    for site in result.runs[0].sites:
        weight = model.get_parameter(site.parameter).detach()
        gone = _mask(weight.abs() * sums[site.name].sqrt(), "2:4")
        assert torch.equal(result.weight(site.parameter), weight.masked_fill(gone, 0)), site.name


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_a_table_becomes_is_found_anew_when_its_layer_is_pruned(schedule: str) -> None:
    result, model, _ = compiled(schedule)
    block: Any = model.blocks[1]
    with torch.no_grad():
        inner = block.inner.weight.masked_fill(_mask(block.inner.weight.abs() * block.table.norm(dim=0), "2:4"), 0)
        # A block is measured while it is dense, all of it.
        seen = inner if schedule == "layer" else block.inner.weight
        hidden = nn.functional.linear(block.table, seen, block.inner.bias).relu()
        outer = block.outer.weight.masked_fill(_mask(block.outer.weight.abs() * hidden.norm(dim=0), "2:4"), 0)
    assert torch.equal(result.weight("blocks.1.inner.weight"), inner)
    assert torch.equal(result.weight("blocks.1.outer.weight"), outer)


@pytest.mark.parametrize("spec", ["sparsegpt:2:4", "magnitude:2:4"])
def test_other_methods(spec: str) -> None:
    model, batches = made()
    result = sparsify.compile(model, [spec], calibration=batches)
    assert {site.name for site in result.runs[0].sites} >= {"blocks.0.inner", "blocks.0.q", "blocks.1.outer"}


def test_a_layer_whose_input_is_always_zero_stays_and_is_named() -> None:
    result, _, _ = compiled("layer")
    reasons = {skipped.node: skipped.reason for skipped in result.runs[0].skipped}
    assert reasons["blocks.0.empty"] == "its input is zero whatever the model is given"
    assert not result.opaque, "what a layer makes of a table is an activation"
