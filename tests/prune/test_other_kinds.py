"""Models of other kinds pruned by their user's own batches: masks are those that hooks on the eager model give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.folders import load
from support.kinds import batch, run, save
from support.reference import _mask
from torch import Tensor, nn

import sparsify

QUICK = ("whisper", "clip", "siglip", "marian", "falcon_h1", "hubert", "lfm2", "deberta", "informer")
KINDS = [*QUICK, *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("rwkv", "tagger"))]


@pytest.mark.first(4)
@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_those_of_hooks(kind: str, tmp_path: Path) -> None:
    dense = save(kind, tmp_path / "dense")
    given = [batch(kind), {name: value.flip(-1) for name, value in batch(kind).items()}]
    result = sparsify.compile(dense, ["wanda:2:4"], calibration=given, schedule="dense", output=tmp_path / "out")
    model, pruned = load(dense), dict(load(tmp_path / "out").named_parameters())
    linears = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    sums = {name: torch.zeros(m.in_features) for name, m in linears.items()}

    def watch(name: str, m: nn.Linear) -> None:
        def measure(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            sums[name] += args[0].reshape(-1, m.in_features).float().square().sum(0)

        m.register_forward_pre_hook(measure)

    for name, m in linears.items():
        watch(name, m)
    for one in given:
        run(model, one)
    targets = [target.parameter for target in result.runs[0].targets]
    assert set(targets) <= linears.keys() and len(targets) >= 8
    for name, parameter in model.named_parameters():
        if name in targets:
            gone = _mask(parameter.detach().abs() * sums[name].sqrt(), "2:4")
            assert torch.equal(pruned[name] == 0, gone), name
            assert torch.equal(pruned[name], parameter.masked_fill(gone, 0)), name
        else:
            assert torch.equal(pruned[name], parameter), name
