"""Model folders that lie, are broken, or are of two minds: each a clear error, and nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import save

import sparsify
from sparsify.errors import CalibrationError, CheckpointError, SparsifyError

IDS = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save("llama", tmp_path / "model")


def edit_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(model: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def refused(model: Path, tmp_path: Path, kind: type[SparsifyError], says: str) -> None:
    with pytest.raises(kind) as caught:
        sparsify.compile(model, ["wanda:2:4"], calibration=[IDS], output=tmp_path / "out")
    assert says in str(caught.value)
    # A journal of what was finished is for --resume, where anything was.
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".out.unfinished-")) == ["model"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": 48}, "by config.json"),
        ({"num_hidden_layers": 3}, "have no tensor in the folder, first model.layers.2"),
        ({"num_hidden_layers": 1}, "have no place in the config's model, first model.layers.1"),
        ({"vocab_size": 65}, "(64, 32) in the folder, (65, 32) by config.json"),
        ({"model_type": "no-such-model"}, "transformers cannot read it"),
        ({"num_attention_heads": 0}, "config.json"),
    ],
)
def test_a_config_that_lies(model: Path, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    edit_config(model, **changes)
    refused(model, tmp_path, CheckpointError, says)


def test_a_config_that_is_missing_or_no_json(model: Path, tmp_path: Path) -> None:
    (model / "config.json").write_text("{")
    refused(model, tmp_path, CheckpointError, "config.json: not JSON")
    (model / "config.json").unlink()
    refused(model, tmp_path, CheckpointError, "config.json")


def test_names_that_the_config_does_not_have(model: Path, tmp_path: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.sideways_proj.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")

    edit_weights(model, rename)
    refused(model, tmp_path, CheckpointError, "first model.layers.0.mlp.sideways_proj.weight")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(model: Path, tmp_path: Path, bad: float) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][3, 3] = bad

    edit_weights(model, spoil)
    refused(model, tmp_path, CheckpointError, "tensor model.layers.1.mlp.down_proj.weight")


def test_an_embedding_that_was_allowed_is_found_at_the_first_site_it_reaches(model: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"][int(IDS[1, 3])] = float("nan")

    edit_weights(model, spoil)
    refused(model, tmp_path, CheckpointError, "tensor model.embed_tokens.weight")
    with pytest.raises(CalibrationError, match=r"the input of model\.layers\.0\.self_attn\.q_proj"):
        sparsify.compile(model, ["wanda:2:4"], calibration=[IDS], output=tmp_path / "out", allow_nan=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_a_truncated_shard(model: Path, tmp_path: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    refused(model, tmp_path, CheckpointError, "not a sound safetensors file")


def test_code_in_the_folder_is_not_run(model: Path, tmp_path: Path) -> None:
    (model / "modeling_evil.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\nclass EvilConfig: pass\n")
    edit_config(model, auto_map={"AutoConfig": "modeling_evil.EvilConfig"}, model_type="evil")
    refused(model, tmp_path, CheckpointError, "trust-remote-code")


def test_no_space_is_told_before_any_work(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 0))
    refused(model, tmp_path, SparsifyError, "0 MiB free")


def test_a_disk_that_fails_midway_leaves_nothing(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    import os

    real, calls = os.pwritev, []

    def failing(*args: Any) -> int:
        calls.append(1)
        if len(calls) > 5:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, "pwritev", failing)
    refused(model, tmp_path, SparsifyError, "No space left on device")


def test_a_write_that_the_disk_forgets_is_noticed(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from sparsify.files.checkpoint import Checkpoint
    from sparsify.tensors import digest

    def lying(self: Checkpoint, name: str, tensor: torch.Tensor) -> None:
        self.written[name] = digest(tensor)

    monkeypatch.setattr(Checkpoint, "write", lying)
    refused(model, tmp_path, SparsifyError, "reads back otherwise")
