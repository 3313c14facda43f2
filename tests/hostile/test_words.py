"""Words and values that make no sense, to the commands and from Python: one sentence of ours, and exit code 1 or 2."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.command_line import sparsify as command
from support.families import build, save
from support.folders import SMALLEST

import sparsify
from sparsify.backends.onnx.running.runner import Runner
from sparsify.backends.verify.onnx_folder import verify_onnx
from sparsify.errors import CalibrationError, SparsifyError, SpecError
from sparsify.words import parse_bytes


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, packed, and as ONNX."""
    place = tmp_path_factory.mktemp("made")
    dense = save("llama", place / "dense")
    for name, to in (("packed", SMALLEST), ("onnx", "onnx:weights=link")):
        sparsify.compile(dense, ["magnitude:2:4"], output=place / name, to=to)
    return place


@pytest.mark.parametrize("name", ["/nope", "no\nsuch", "{made}/dense/config.json", "/dev/null", "x/packed"])
@pytest.mark.parametrize("words", [["unpack"], ["expand"], ["verify"], ["bench"], ["inspect"], ["run", "hi"]])
def test_no_such_folder(words: list[str], name: str, made: Path, tmp_path: Path) -> None:
    out = ["-o", tmp_path / "out"] if words[0] in ("unpack", "expand") else []
    done = command(words[0], name.format(made=made), *words[1:], *out)
    assert done.returncode == 1 and "unexpected" not in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["run", "{made}/onnx", "hi", "--seed", "-1"],
        ["run", "{made}/onnx", "hi", "--threads", "99999999999"],
        ["run", "{made}/onnx", "hi", "--temperature", "inf"],
        ["run", "{made}/onnx", "hi", "--temperature", "nan"],
        ["bench", "{made}/packed", "--threads", "99999999999"],
        ["tune", "{made}/dense", "--data", "random", "-o", "out", "--save-every", "0"],
    ],
)
def test_values_of_no_sense(words: list[str], made: Path) -> None:
    done = command(*(word.format(made=made) for word in words))
    assert done.returncode == 2 and "unexpected" not in done.stderr, done.stderr


def test_a_rank_above_every_matrix(made: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from sparsify.tuning.recipe import Recipe
    from sparsify.tuning.tune import tune

    text = tmp_path / "ids.safetensors"
    save_file({"input_ids": torch.arange(2000) % 57 + 3}, text)
    recipe = Recipe(steps=1, batch=4, micro=4, samples=8, length=16, rank=10**7)
    with pytest.raises(SpecError, match="no matrix of dense has a rank above"):
        tune(made / "dense", str(text), tmp_path / "out", recipe)


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(2, 16, dtype=torch.long, device="meta"),
        {"input_ids": torch.zeros(2, 16, dtype=torch.complex64)},
        {"input_ids": torch.zeros(2, 16, dtype=torch.bool)},
        torch.zeros(2, 16, dtype=torch.complex64),
        torch.zeros(2, 16),
    ],
)
def test_batches_that_are_no_ids(batch: Any) -> None:
    with pytest.raises(CalibrationError):
        sparsify.compile(build("llama"), ["wanda:2:4"], calibration=[batch])


def test_a_loss_of_no_ids_is_refused() -> None:
    embedded = {"inputs_embeds": torch.randn(2, 16, 32)}
    with pytest.raises(CalibrationError, match="no token ids to predict"):
        sparsify.compile(build("llama"), ["gblm:2:4"], calibration=[embedded])


def test_memory_below_nothing() -> None:
    with pytest.raises(SpecError, match="memory '-1'"):
        parse_bytes(-1)


def test_a_graph_in_a_hub_cache_is_refused_with_what_to_do(made: Path, tmp_path: Path) -> None:
    """Its files are links into the cache's blobs, and onnxruntime follows none to its data."""
    blobs, snapshot = tmp_path / "models--x--y" / "blobs", tmp_path / "models--x--y" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in (made / "onnx").iterdir():
        shutil.copyfile(path, blobs / path.name)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", path.name))
    for read in (verify_onnx, Runner):
        with pytest.raises(SparsifyError, match="hf download --local-dir"):
            read(snapshot)
