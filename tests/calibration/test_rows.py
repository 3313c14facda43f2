"""From activations to rows: padding that can be told is left out, and padding that cannot is refused."""

from __future__ import annotations

import pytest
import torch
from support.families import build, inputs
from torch import Tensor, nn

import sparsify
from sparsify.calibration.measuring import drift, measure_inputs
from sparsify.calibration.recorder import OutputMoments
from sparsify.context import Context
from sparsify.errors import CalibrationError
from sparsify.frontend.capture import capture
from sparsify.frontend.source import open_source
from sparsify.ir.store import MemoryStore
from sparsify.method.pattern import Unstructured
from sparsify.prune.names import Wanted
from sparsify.prune.targets import choose

PADDED = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])


class Masked(nn.Module):
    """Something that reads a mask beside values [batch, tokens, 8]."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.part(x) * attention_mask.sum()


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).reshape(-1, 2, 8).mean(1))


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x.transpose(1, 2))


class Stack(nn.Module):
    """Experts in one batched product: each sees every token."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x.reshape(1, -1, 8).expand(3, -1, -1), self.weight)


@pytest.mark.parametrize("part", [Pooled, Turned, Stack])
def test_padding_that_cannot_be_told_is_refused(part: type[nn.Module]) -> None:
    torch.manual_seed(0)
    batch = {"x": torch.randn(2, 4, 8), "attention_mask": PADDED}
    net = Masked(part())
    only = ["part*"]
    with pytest.raises(
        CalibrationError, match=r"the attention mask \(2, 4\) at part.*whose padded rows cannot be told"
    ):
        sparsify.compile(net, ["wanda:50%"], calibration=[batch], only=only)
    full = batch | {"attention_mask": torch.ones_like(PADDED)}
    if part is not Pooled:  # whose rows are fewer than the mask's, padding or none
        sparsify.compile(net, ["wanda:50%"], calibration=[full], only=only)


def test_no_token_at_all_is_refused() -> None:
    batch = inputs("llama", attention_mask=torch.zeros(2, 16, dtype=torch.long))
    with pytest.raises(CalibrationError, match="no calibration token reaches it"):
        sparsify.compile(build("llama"), ["wanda:2:4"], calibration=[batch])


def test_moments_of_outputs_with_and_without_biases() -> None:
    weight, biases = torch.randn(2, 3, 5), torch.randn(2, 3)
    x = torch.randn(7, 5)
    for held in (biases, None):
        moments = OutputMoments(("output_sum", "output_square", "gram"), weight, held)
        for part in x.split(4):
            moments.update(1, part)
        y = x @ weight[1].t() + (0 if held is None else biases[1])
        found = moments.values(1)
        torch.testing.assert_close(found["output_sum"].float(), y.sum(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found["output_square"].float(), y.square().sum(0), rtol=1e-4, atol=1e-4)
        assert found.keys() == {"output_sum", "output_square"} and moments.values(0) == {}


def test_drift_is_against_the_dense_models_own_outputs() -> None:
    """Two layers, the first one changed: the second's input differs though its weight does not."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)), torch.randn(20, 6)
    program = capture(open_source(net), {"0": x})
    dense = program.weights
    targets, _ = choose(program, Unstructured("0.5"), Wanted())
    program.weights = dense.on(MemoryStore(dense.store))
    program.weights.write("0.weight", dense.read("0.weight") * torch.linspace(0, 1, 6))
    sites = [site for target in targets for site in target.sites]
    found = drift(program, sites, [{"0": x}], dense, Context())
    with torch.no_grad():
        new, old = program.weights.read("0.weight"), net[0].weight
        first, moved = x @ old.t(), x @ new.t()
        inner, other = first + net[0].bias, moved + net[0].bias
        second, after = inner @ net[1].weight.t(), other @ net[1].weight.t()
    assert found["0"] == pytest.approx(float((first - moved).norm() / first.norm()), rel=1e-4)
    assert found["1"] == pytest.approx(float((second - after).norm() / second.norm()), rel=1e-4)
    assert measure_inputs(program, sites, [{"0": x}], (), Context()).keys() == {"0.weight", "1.weight"}
