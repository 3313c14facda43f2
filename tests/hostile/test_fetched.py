"""Folders that were fetched or changed halfway: said by what happened, with what helps."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.families import save

import sparsify
from sparsify.backends.bench.measure import bench
from sparsify.errors import CheckpointError
from sparsify.files.checkpoint import WEIGHTS, Checkpoint
from sparsify.files.ledger import digest_of_header
from sparsify.files.reading import admit

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 988097824\n" % (b"ab" * 32)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save("llama", tmp_path / "model")


def refused(model: Path, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        sparsify.compile(model, ["magnitude:2:4"], output=model.parent / "out")
    assert not (model.parent / "out").exists()


NEEDED = [WEIGHTS, "config.json", "tokenizer.json", "tokenizer.model", "generation_config.json"]


@pytest.mark.parametrize("name", NEEDED)
def test_what_git_lfs_did_not_fetch(model: Path, name: str) -> None:
    (model / name).write_bytes(POINTER)
    refused(model, f"{name}: a Git LFS pointer.*git lfs pull")


def test_pointers_of_other_forms(model: Path, tmp_path: Path) -> None:
    """A GGUF file, a shard; a picture beside the model is carried as it is, and text that is longer is none."""
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(POINTER)
    refused(gguf, "a Git LFS pointer")
    (model / "picture.png").write_bytes(POINTER)
    (model / "README.txt").write_bytes(POINTER + b"x" * 1024)
    out = sparsify.compile(model, ["magnitude:2:4"], output=tmp_path / "out").output
    assert out is not None and (out / "picture.png").read_bytes() == POINTER


def test_a_link_to_nothing(model: Path) -> None:
    (model / "notes.txt").symlink_to("/nowhere/notes")
    refused(model, "notes.txt: a link to /nowhere/notes, where nothing is. Remove the link")
    with pytest.raises(CheckpointError, match="where nothing is"):
        admit(model / "notes.txt")


def test_a_config_with_a_byte_order_mark(model: Path) -> None:
    config = model / "config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    refused(model, "config.json.*a byte-order mark: save it as UTF-8 without one")


@pytest.mark.parametrize("left", [0, 7, 100, -1])
def test_weights_that_are_cut_short_while_they_are_read(model: Path, tmp_path: Path, left: int) -> None:
    """In the header, or in the last tensor: the file or the tensor is named."""
    checkpoint, path = Checkpoint(model), model / WEIGHTS
    path.write_bytes(path.read_bytes()[:left])
    (tmp_path / "copy").mkdir()
    for look in (lambda: checkpoint.copy_to(tmp_path / "copy"), checkpoint.digests, checkpoint.scans):
        with pytest.raises(CheckpointError, match=rf"{WEIGHTS}.*ended early"):
            look()
    if left == 100:
        with pytest.raises(CheckpointError, match=rf"{WEIGHTS}: it ended early"):
            digest_of_header(path)


def test_a_benchmark_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name, says in (("nowhere", "no such folder"), ("file", "a file")):
        with pytest.raises(CheckpointError, match=says):
            bench(tmp_path / name)
