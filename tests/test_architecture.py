"""What the documents say of the house is so: every module that they name exists, every room is named."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from support.layers import STOREYS

import sparsify

ROOT = Path(__file__).parent.parent
PAGES = ("docs/architecture.md", "CONTRIBUTING.md")


@pytest.mark.parametrize("page", PAGES)
def test_every_path_in_the_documents_exists(page: str) -> None:
    named = re.findall(r"`((?:sparsify|passes|backends|tests|tools|docs)/[\w./-]*)`", (ROOT / page).read_text())
    named = [path for path in named if not re.search(r"NAME|METHOD", path)]
    assert len(named) > 10
    assert not [path for path in named if not (ROOT / path).exists()]


def test_short_names_in_the_architecture_are_modules() -> None:
    """`prune/turn`, `ir/rules.py`, `data/sources`: a room and a module in it."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    rooms = {room for storey in STOREYS for room in storey} - {"passes", "backends"}
    short = [m for m in re.findall(r"`([a-z]+/[a-z_]+)(?:\.py)?`", text) if m.split("/")[0] in rooms]
    assert len(short) > 5
    core = ROOT / "sparsify"
    assert not [m for m in short if not (core / f"{m}.py").exists() and not (core / m).is_dir()]


def test_every_room_has_a_line() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text().partition("## The way")[0]
    for storey in STOREYS:
        for room in storey:
            assert f"{room}/`" in text or f"{room}.py`" in text, room


def test_the_graph_pass_of_the_architecture_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "architecture.md").read_text(), flags=re.S)
    module = types.ModuleType("graph_pass_of_the_architecture")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code, "architecture.md", "exec"), module.__dict__)
    net = torch.nn.Sequential(torch.nn.Linear(8, 8))
    clipped = sparsify.compile(net, [module.Clip(0.1), "magnitude:2:4"], calibration=[torch.randn(4, 8)]).weight(
        "0.weight"
    )
    assert float(clipped.abs().max()) == pytest.approx(0.1) and int((clipped == 0).sum()) == 32
