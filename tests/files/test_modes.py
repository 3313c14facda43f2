"""Outputs may be read by those who may read their source, and by nobody else."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.families import deep

import sparsify
from sparsify.backends.onnx.expand import expand
from sparsify.backends.packed.unpack import unpack_folder
from sparsify.files.modes import carry_modes


def modes(folder: Path) -> dict[str, int]:
    return {p.name: stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()} | {
        ".": stat.S_IMODE(folder.stat().st_mode)
    }


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def write(folder: Path, **files: int) -> Path:
    folder.mkdir(mode=files.pop("own", 0o755))
    for name, mode in files.items():
        path = folder / name.replace("_", ".")
        path.touch()
        path.chmod(mode)
    return folder


@pytest.mark.parametrize(
    ("like", "expected"),
    [
        ({"model_bin": 0o600, "config_json": 0o640}, {"config.json": 0o640, "new.json": 0o600, ".": 0o755}),
        ({"model_bin": 0o664, "config_json": 0o664}, {"config.json": 0o664, "new.json": 0o664, ".": 0o755}),
        ({"model_bin": 0o666, "config_json": 0o777}, {"config.json": 0o775, "new.json": 0o664, ".": 0o755}),
        ({"model_bin": 0o400, "config_json": 0o444}, {"config.json": 0o644, "new.json": 0o600, ".": 0o755}),
        ({"model_bin": 0o640, "other_bin": 0o604, "own": 0o700}, {"config.json": 0o600, "new.json": 0o600, ".": 0o700}),
        ({"config_json": 0o600, "own": 0o500}, {"config.json": 0o600, "new.json": 0o600, ".": 0o700}),
    ],
)
def test_of_each_file(tmp_path: Path, umask: None, like: dict[str, int], expected: dict[str, int]) -> None:
    out = write(tmp_path / "out", config_json=0o644, new_json=0o644)
    carry_modes(write(tmp_path / "like", **like), out, 0o755)
    assert modes(out) == expected


@pytest.mark.first(1)
@pytest.mark.parametrize("private", [True, False])
def test_of_every_output(tmp_path: Path, umask: None, private: bool) -> None:
    """0600 stays 0600, also of files that the source does not have; and what all may read stays so."""
    wide, narrow = (0o600, 0o700) if private else (0o644, 0o755)
    model = tmp_path / "model"
    deep("llama", 1).save_pretrained(model)
    for path in model.iterdir():
        path.chmod(wide)
    model.chmod(narrow)
    made = [tmp_path / name for name in ("hf", "packed", "onnx", "smaller")]
    ids = [torch.arange(32).view(2, 16)]
    sparsify.compile(model, ["magnitude:2:4"], output=made[0])
    sparsify.compile(model, ["magnitude:2:4"], to="packed:choice=smallest", output=made[1])
    sparsify.compile(model, ["magnitude:2:4"], to="onnx:weights=packed", output=made[2])
    sparsify.compile(model, ["llm-pruner:25%,importance=l1"], calibration=ids, output=made[3])
    made += [unpack_folder(made[1], tmp_path / "unpacked"), expand(made[2], tmp_path / "expanded")]
    expand(made[2])
    for folder in made:
        assert modes(folder) == {p.name: wide for p in folder.iterdir()} | {".": narrow}, folder.name
