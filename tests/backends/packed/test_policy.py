"""``policy`` of packed folders: what a server of batches is to keep on CPUs, which the folder says and hands on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.folders import SMALLEST, load

import sparsify
from sparsify.errors import CheckpointError, SpecError


def said(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


@pytest.fixture
def asking(folder: Callable[[str], Path], tmp_path: Path) -> Path:
    sparsify.compile(
        folder("llama"), ["magnitude:2:4"], output=tmp_path / "out", to="packed:choice=smallest,policy=both"
    )
    return tmp_path / "out"


def test_the_folder_says_it_where_it_was_asked_for(asking: Path, tmp_path: Path) -> None:
    assert said(asking)["cpu"] == {"policy": "both"}
    manifest = json.loads((asking / "sparsify.json").read_text())
    assert manifest["packed"]["policy"] == "both"
    # transformers keeps the weights packed alone, and hands on what the folder says.
    model = load(asking)
    assert not [name for name, tensor in model.state_dict().items() if "proj" in name and tensor.shape == (64, 64)]
    model.save_pretrained(tmp_path / "saved")
    assert said(tmp_path / "saved")["cpu"] == {"policy": "both"}
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(load(tmp_path / "saved")(ids).logits, model(ids).logits)


def test_a_folder_says_nothing_of_it_else(folder: Callable[[str], Path], tmp_path: Path) -> None:
    sparsify.compile(folder("llama"), ["magnitude:2:4"], output=tmp_path / "out", to=SMALLEST)
    assert "cpu" not in said(tmp_path / "out")
    load(tmp_path / "out").save_pretrained(tmp_path / "saved")
    assert "cpu" not in said(tmp_path / "saved")


@pytest.mark.parametrize("word", ["prefill", "bth", "1"])
def test_another_word_is_refused(word: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"decode.*both"):
        sparsify.compile(folder("llama"), ["magnitude:2:4"], output=tmp_path / "out", to=f"packed:policy={word}")


@pytest.mark.parametrize("cpu", ["both", {"policy": "prefill"}, {"policy": 2}, {"polcy": "both"}])
def test_a_damaged_folder_is_refused(asking: Path, cpu: object) -> None:
    path = asking / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["cpu"] = cpu
    path.write_text(json.dumps(config))
    (asking / "sparsify.json").unlink()
    with pytest.raises(CheckpointError, match="cpu"):
        load(asking)
