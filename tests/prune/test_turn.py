"""A bias belongs to its matrix: of a depth-wise convolution every channel has a matrix, and one number, of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from support.pruning import fresh
from torch import Tensor, nn

import sparsify
from sparsify.context import Context
from sparsify.frontend.capture import capture
from sparsify.frontend.source import open_source
from sparsify.method.pattern import Unstructured
from sparsify.method.statistics import InputStatistics
from sparsify.method.weight_pass import Pruned, WeightPass
from sparsify.prune.names import Wanted
from sparsify.prune.targets import choose
from sparsify.prune.turn import Turn


@dataclass(frozen=True)
class Silent(WeightPass):
    """Channels whose output is small on average go, bias and all; what is left of the bias is doubled."""

    least: float = 1.0

    name: ClassVar[str] = "silent"

    @property
    def exact_counts(self) -> bool:
        return False

    @property
    def statistics(self) -> tuple[str, ...]:
        return ("squared_norm", "output_absolute")

    def prune(self, weight: Tensor, statistics: InputStatistics) -> Pruned:
        assert statistics.bias is not None and statistics.bias.shape == weight.shape[:1]
        small = statistics.values["output_absolute"] / statistics.tokens < self.least
        mask = small.unsqueeze(1).expand_as(weight).contiguous()
        return Pruned(weight.masked_fill(mask, 0), mask, bias=2 * statistics.bias.masked_fill(small, 0))


def depthwise(seed: int = 0) -> tuple[nn.Conv1d, Tensor]:
    torch.manual_seed(seed)
    layer = nn.Conv1d(8, 8, 4, padding=3, groups=8)
    with torch.no_grad():
        layer.bias.copy_(torch.linspace(-3, 3, 8)[torch.randperm(8)])
    return layer, torch.randn(4, 8, 20)


def outputs_one_by_one(layer: nn.Conv1d, x: Tensor) -> list[float]:
    """Mean |y| of each channel, place by place in plain Python."""
    padded = nn.functional.pad(x, (3, 3)).tolist()
    weight, bias = layer.weight.tolist(), layer.bias.tolist()
    found = []
    for channel in range(8):
        total, count = 0.0, 0
        for sample in padded:
            for at in range(len(sample[channel]) - 3):
                seen = sample[channel][at : at + 4]
                y = bias[channel] + sum(w * v for w, v in zip(weight[channel][0], seen, strict=True))
                total, count = total + abs(y), count + 1
        found.append(total / count)
    return found


def test_each_channel_is_measured_with_its_own_bias_and_every_bias_is_written() -> None:
    layer, x = depthwise()
    loud = outputs_one_by_one(layer, x)
    least = sorted(loud)[2] + 1e-3
    stays = torch.tensor([y >= least for y in loud])
    assert int((~stays).sum()) == 3
    made: Any = sparsify.compile(
        nn.Sequential(layer), [Silent(Unstructured("0.5"), least=least)], calibration=[x], only=["0"]
    )
    weight, bias = made.weight("0.weight"), made.weight("0.bias")
    assert torch.equal(weight, layer.weight * stays.view(8, 1, 1))
    assert torch.equal(bias, 2 * layer.bias * stays), "each of them, and not the last one's alone"
    assert made.runs[0].written == {"0.weight", "0.bias"} and made.runs[0].sites[0].written == ["0.weight", "0.bias"]


@pytest.mark.parametrize("metric", ["mean", "square", "std"])
def test_activation_of_a_depthwise_convolution(metric: str) -> None:
    """Every channel is a matrix of one neuron: by the official rule, one weight more, it goes with its bias."""
    layer, x = depthwise()
    net = nn.Sequential(layer, nn.Conv1d(8, 8, 1))
    made = sparsify.compile(net, [f"activation:25%,metric={metric},count=threshold"], calibration=[x], only=["0"])
    assert not made.weight("0.weight").any() and not made.weight("0.bias").any()
    assert torch.equal(made.weight("1.weight"), net[1].weight) and torch.equal(made.weight("1.bias"), net[1].bias)
    kept = sparsify.compile(net, [f"activation:25%,metric={metric}"], calibration=[x], only=["0"])
    assert torch.equal(kept.weight("0.weight"), layer.weight), "a quarter of one neuron is none"
    assert torch.equal(kept.weight("0.bias"), layer.bias)


def test_a_turn_without_data_leaves_the_bias() -> None:
    layer, x = depthwise()
    program = fresh(capture(open_source(nn.Sequential(layer)), {"0": x}))
    wanted = Wanted.of(program.weights, ["0"])
    (target,), _ = choose(program, Unstructured("0.5"), wanted)
    method = sparsify.parse_pass("magnitude:50%")
    assert isinstance(method, WeightPass)
    done = Turn(program, method, target, Context().device).take()
    assert done.written == ["0.weight"] and done.kept == 0.5 and done.error is None and done.tokens == 0
    assert torch.equal(program.weights.read("0.bias"), layer.bias)
    zeros = (program.weights.read("0.weight") == 0).sum(dim=2)
    assert zeros.flatten().tolist() == [2] * 8, "half of each channel's kernel"
