"""Models that write to their own parameters while they run."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as hf
from torch import nn

import sparsify


class Halves(nn.Module):
    """Scales two of its weights by itself when it first runs, as RWKV does."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16, bias=False)
        self.second = nn.Linear(16, 8, bias=False)
        self.done = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.done:
            with torch.no_grad():
                self.first.weight.div_(4)
                self.second.weight.mul_(0.5)
            self.done = True
        return self.second(torch.relu(self.first(x)))


def test_what_a_model_does_to_its_weights_is_not_done_to_the_users() -> None:
    torch.manual_seed(0)
    model = Halves()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    x = torch.randn(6, 16)
    made = sparsify.compile(model, ["magnitude:2:4"], calibration=[x])
    assert [r.skipped for r in made.runs][0] == [] and len(made.runs[0].targets) == 2
    for name, weight in before.items():
        assert torch.equal(model.get_parameter(name), weight)
        kept = made.model.get_parameter(name) != 0
        assert torch.equal(made.model.get_parameter(name)[kept], weight[kept]), "stored weights are not scaled"


def test_every_batch_sees_the_same_weights() -> None:
    """Masks of a weight behind a scaled one are those of plain hooks: scaled once, not once a batch."""
    torch.manual_seed(0)
    model, x = Halves(), torch.randn(3, 4, 16)
    made = sparsify.compile(model, ["wanda:2:4"], calibration=list(x), schedule="dense").model
    first, second = (m.weight.detach() for m in (model.first, model.second))
    hidden = torch.relu(x.flatten(0, 1) @ first.T / 4)
    score = second.abs() * hidden.norm(dim=0)
    dropped = torch.zeros_like(score, dtype=torch.bool)
    lowest = score.view(8, 4, 4).argsort(stable=True, dim=-1)[..., :2]
    dropped.view(8, 4, 4).scatter_(-1, lowest, True)
    assert torch.equal(made.second.weight == 0, dropped)


def test_rwkv_of_many_layers(tmp_path: Path) -> None:
    """From the seventh layer on RWKV divides weights; every linear layer of it is pruned, and the output loads."""
    torch.manual_seed(0)
    config = hf.RwkvConfig(
        vocab_size=64, hidden_size=16, attention_hidden_size=16, num_hidden_layers=3, intermediate_size=32,
        rescale_every=1,
    )  # fmt: skip
    model = hf.RwkvForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    ids = torch.randint(3, 60, (2, 8))
    made = sparsify.compile(tmp_path / "model", ["wanda:2:4"], calibration=[ids], output=tmp_path / "out")
    assert len(made.runs[0].targets) == 3 * 7
    loaded = hf.RwkvForCausalLM.from_pretrained(tmp_path / "out").eval()
    for name, weight in loaded.named_parameters():
        dense = model.get_parameter(name)
        kept = weight != 0
        assert torch.equal(weight[kept], dense[kept])
        if name.endswith((".key.weight", ".value.weight", ".receptance.weight", ".output.weight")):
            assert int((weight.view(-1, 4) != 0).sum(1).max()) == 2


class Beside(nn.Module):
    """Two products whose inputs are both made before either of them runs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.relu(), x.sigmoid()
        return self.left(first) * self.right(second)


def test_the_last_input_may_be_made_before_others_are_read() -> None:
    torch.manual_seed(0)
    model = Beside()
    for schedule in ("layer", "block", "dense"):
        made = sparsify.compile(model, ["wanda:2:4"], calibration=[torch.randn(4, 16)], schedule=schedule)
        assert len(made.runs[0].targets) == 2 and made.runs[0].sites
