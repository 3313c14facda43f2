"""A structural pass in several rounds, each on the model that the one before left."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from support.folders import load
from torch import Tensor

import sparsify
from sparsify.method.spec import parse_pass
from sparsify.method.structural_pass import StructuralPass


def test_in_several_steps(folder: Callable[[str], Path], tmp_path: Path, ids: Tensor) -> None:
    owner = parse_pass("llm-pruner:50%,steps=3")
    assert isinstance(owner, StructuralPass)
    left = 96
    for one in owner.rounds():
        left = one.left(left, "channels")
    assert len(owner.rounds()) == 3 and left == 48
    dense = folder("llama")
    result = sparsify.compile(dense, ["llm-pruner:50%,steps=2"], calibration=[ids], output=tmp_path / "out")
    assert [c.after for s in result.structure for c in s.cuts if c.kind == "channels"] == [48, 48, 32, 32]
    assert load(tmp_path / "out").config.intermediate_size == 32
    assert len(json.loads((tmp_path / "out" / "sparsify.json").read_text())["structure"]) == 2


def test_names_of_another_pass_are_not_those_of_a_round(
    folder: Callable[[str], Path], tmp_path: Path, ids: Tensor
) -> None:
    """The second round of the first pass is no second pass."""
    smaller, other = "llm-pruner:50%,steps=2,importance=l1", {"pass": "wanda:50%", "only": ["*.layers.0.*"]}
    result = sparsify.compile(folder("llama"), [smaller, other], calibration=[ids], output=tmp_path / "out")
    first, second = ([cut.name for cut in done.cuts] for done in result.structure)
    assert all(any("layers.1" in name for name in each) for each in (first, second))
