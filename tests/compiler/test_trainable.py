"""Models that are handed over train as those of transformers' ``from_pretrained`` do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import kinds
from support.families import build, save
from support.folders import load
from torch import nn

import sparsify


def trained(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "marian"])
def test_as_transformers_loads_them(family: str, tmp_path: Path) -> None:
    """Tied ones, tables of sines that no file holds, and all others."""
    (kinds.save if family == "marian" else save)(family, tmp_path / "model")
    wanted = trained(load(tmp_path / "model"))
    assert all(wanted.values())
    made = sparsify.compile(tmp_path / "model", ["magnitude:50%"], output=tmp_path / "out")
    assert made.model is not made.model, "a model of its own each time"
    for model in (made.model, sparsify.load(tmp_path / "out"), sparsify.load(tmp_path / "out", dtype=torch.bfloat16)):
        assert trained(model) == wanted and all(p.is_leaf for p in model.parameters())


def test_a_step_of_training_needs_nothing_else(tmp_path: Path) -> None:
    save("llama", tmp_path / "model")
    model: Any = sparsify.compile(tmp_path / "model", ["magnitude:2:4"]).model
    ids = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    before = model(input_ids=ids, labels=ids).loss
    with sparsify.hold_zeros(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before.backward()
        optimizer.step()
    assert model(input_ids=ids, labels=ids).loss < before


def test_packed_folders_are_dense_when_they_are_loaded(tmp_path: Path) -> None:
    save("llama", tmp_path / "model")
    sparsify.compile(tmp_path / "model", ["magnitude:2:4"], to="packed:choice=smallest", output=tmp_path / "out")
    assert all(trained(sparsify.load(tmp_path / "out")).values())


def test_a_module_keeps_what_it_says_of_itself() -> None:
    model = build("llama")
    model.model.layers[0].requires_grad_(False)
    made = sparsify.compile(model, ["magnitude:2:4"]).model
    assert trained(made) == trained(model) and len(set(trained(made).values())) == 2
