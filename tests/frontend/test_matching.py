"""Parameters matched with the tensors of a checkpoint: their shapes are known before anything is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.families import FAMILIES, build

from sparsify.files.checkpoint import Checkpoint
from sparsify.frontend.matching import weights_of_module
from sparsify.frontend.source import open_source


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_are_known_without_a_read(
    family: str, folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = open_source(folder(family)).weights
    names = [*weights.parameters(), *weights.aliases]
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "read", lambda *_: pytest.fail("a weight was read"))
        shapes = {name: weights.shape(name) for name in names}
    assert shapes and all(weights.read(name).shape == shape for name, shape in shapes.items())


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "t5"])
def test_a_module_holds_what_its_folder_holds(family: str, folder: Callable[[str], Path]) -> None:
    stored, held = open_source(folder(family)).weights, weights_of_module(build(family))
    assert {stored.canonical(n) for n in stored.parameters()} == {held.canonical(n) for n in held.parameters()}
    for name in held.parameters():
        assert held.shape(name) == stored.shape(name) and torch.equal(held.read(name), stored.read(name)), name
