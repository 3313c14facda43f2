"""Folders whose files are no files, lie elsewhere, or ask for more than they hold: refused at once, nothing written."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import save

import sparsify
from sparsify.backends.onnx.running.runner import Runner
from sparsify.errors import CheckpointError
from sparsify.files.checkpoint import MAX_HEADER
from sparsify.files.json_text import MAX_DEPTH
from sparsify.files.reading import MAX_CONFIG, MAX_INDEX, read_json
from sparsify.frontend.building import bounds
from sparsify.frontend.source import open_source

# Seconds that a refusal may take, where each of these took minutes or for ever.
AT_ONCE = 10


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save("llama", tmp_path / "model")


def refused(model: Path, says: str, **options: Any) -> None:
    began = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        sparsify.compile(model, ["magnitude:2:4"], output=model.parent / "out", **options)
    assert says in str(caught.value)
    assert time.monotonic() - began < AT_ONCE and not (model.parent / "out").exists()


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "sparsify.json", "tokenizer.json", "generation_config.json"]
)
def test_a_fifo_is_not_opened(model: Path, name: str) -> None:
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    refused(model, f"{name}: a FIFO")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "sparsify.json", "tokenizer.json", "notes.txt"])
@pytest.mark.parametrize("target", ["/dev/zero", "/etc/hostname", "../elsewhere"])
def test_a_link_to_elsewhere_is_not_followed(model: Path, name: str, target: str) -> None:
    (model.parent / "elsewhere").write_text("private")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(target)
    refused(model, "outside the model's folder")


def test_a_shard_may_not_be_a_link_to_elsewhere(model: Path) -> None:
    (model / "model.safetensors").rename(model.parent / "part.safetensors")
    (model / "part.safetensors").symlink_to(model.parent / "part.safetensors")
    index = {"weight_map": dict.fromkeys(["model.norm.weight"], "part.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(model, "part.safetensors: a link to")


def test_pickles_that_are_none(model: Path) -> None:
    (model / "model.safetensors").unlink()
    os.mkfifo(model / "pytorch_model.bin")
    refused(model, "a FIFO", allow_bin=True)
    (model / "pytorch_model.bin").unlink()
    (model / "pytorch_model.bin.index.json").write_text("[")
    refused(model, "not JSON", allow_bin=True)


def test_links_that_stay_or_lead_nowhere(model: Path) -> None:
    (model / "real.txt").write_text("a licence")
    (model / "LICENSE").symlink_to("real.txt")
    sparsify.compile(model, ["magnitude:2:4"], output=model.parent / "out")
    assert (model.parent / "out" / "LICENSE").read_text() == "a licence"
    assert not (model.parent / "out" / "LICENSE").is_symlink()
    shutil.rmtree(model.parent / "out")
    (model / "gone.txt").symlink_to("nothing")
    refused(model, "gone.txt: a link to nothing, where nothing is")


def cached(model: Path, root: Path) -> Path:
    """``model`` as huggingface_hub lays it into its cache."""
    repository = root / "models--someone--llama"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(model.iterdir())):
        shutil.copyfile(path, repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_a_snapshot_of_the_hubs_cache_is_read(model: Path, tmp_path: Path) -> None:
    snapshot = cached(model, tmp_path / "hub")
    made = sparsify.compile(snapshot, ["magnitude:2:4"], output=tmp_path / "out")
    assert made.output is not None and not any(path.is_symlink() for path in made.output.iterdir())
    (tmp_path / "by-name").symlink_to(snapshot)
    sparsify.load(tmp_path / "by-name")


def test_a_blob_that_is_a_link_itself_is_refused(model: Path, tmp_path: Path) -> None:
    snapshot = cached(model, tmp_path / "hub")
    blob = (snapshot / "config.json").resolve()
    (tmp_path / "private").write_bytes(blob.read_bytes())
    blob.unlink()
    blob.symlink_to(tmp_path / "private")
    refused(snapshot, "outside the model's folder")


def test_a_folder_that_only_looks_like_a_cache(model: Path, tmp_path: Path) -> None:
    """Blobs of another repository, and a folder above that is no repository of the hub's."""
    snapshot = cached(model, tmp_path / "hub")
    other = cached(model, tmp_path / "other")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to((other / "config.json").resolve())
    refused(snapshot, "outside the model's folder")
    renamed = (tmp_path / "other" / "models--someone--llama").rename(tmp_path / "other" / "llama")
    refused(renamed / "snapshots" / "0123abc", "outside the model's folder")


def edit(model: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((model / "config.json").read_text())
    change(config)
    (model / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": 10**5}, "num_hidden_layers 100000 for the 21 tensors"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({"vision_config": {"depths": [2, 2, 10**7]}}, "depths 10000000"),
        ({"num_labels": 10**9}, "num_labels"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings"),
    ],
)
def test_a_config_that_asks_for_more_than_there_is(model: Path, change: dict[str, Any], says: str) -> None:
    edit(model, lambda config: config.update(change))
    refused(model, says)


def test_a_hundred_thousand_experts(tmp_path: Path) -> None:
    model = save("mixtral", tmp_path / "model")
    edit(model, lambda config: config.update(num_local_experts=10**5))
    refused(model, "config.json")


def test_a_model_that_grows_while_it_is_built_is_stopped(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever field says it: here no field is known by its name."""
    monkeypatch.setattr(bounds, "_LAYERS", bounds.re.compile("nothing"))
    edit(model, lambda config: config.update(num_hidden_layers=10**5))
    refused(model, "parts for the 21 tensors")
    assert torch.nn.Linear(2, 2).weight.shape == (2, 2)  # the hooks are gone


def test_what_is_computed_and_not_read_may_not_fill_the_memory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_BUFFERS", 31)
    refused(model, "bytes of tensors to compute")
    monkeypatch.undo()
    sparsify.load(model)


def test_json_that_is_too_deep_or_too_large(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = model / "config.json"
    for depth in (MAX_DEPTH + 1, 10**5):
        path.write_text('{"a":' * depth + "1" + "}" * depth)
        refused(model, f"more than {MAX_DEPTH} deep")
    path.write_text('{"a":' * MAX_DEPTH + "1" + "}" * MAX_DEPTH)
    read_json(path)
    path.write_text("{}" + " " * MAX_CONFIG)
    refused(model, "bytes, more than")
    path.write_text("{}" + " " * (MAX_CONFIG - 2))
    assert read_json(path) == {}
    path.write_text("[1]")
    refused(model, "no table")
    path.write_bytes(b"\xff\xfe{}")
    refused(model, "not JSON")
    path.write_text('{"a": ' + "1" * 5000 + "}")
    refused(model, "not JSON")


@pytest.mark.parametrize("name", ["sparsify.json", "model.safetensors.index.json"])
def test_json_beside_the_config(model: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name != "sparsify.json":
        (model / "model.safetensors").rename(model / "part.safetensors")
    (model / name).write_text("[" * 10**5)
    refused(model, f"{name}: not JSON (lists or tables")


def test_headers_within_bounds(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = model / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes((MAX_HEADER + 1).to_bytes(8, "little") + whole[8:])
    refused(model, f"a header of {MAX_HEADER + 1} bytes")
    path.write_bytes(b"\x05")
    refused(model, "not a sound safetensors file")
    path.write_bytes(whole)
    monkeypatch.setattr("sparsify.files.checkpoint.MAX_TENSORS", 20)
    refused(model, "22 tensors, more than 20")


def test_a_graph_that_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.onnx")
    with pytest.raises(CheckpointError, match="a FIFO"):
        Runner(tmp_path)


@pytest.mark.parametrize("text", ["[" * 10**5, "{}", "5", ""])
def test_a_tokenizer_that_is_none(bundled: Path, tmp_path: Path, text: str) -> None:
    model = Path(shutil.copytree(bundled, tmp_path / "model"))
    (model / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match="a tokenizer for"):
        open_source(model).tokenizer()


def test_json_of_other_files_is_bounded(model: Path) -> None:
    with (model / "tokenizer.json").open("wb") as file:
        file.truncate(MAX_INDEX + 1)
    refused(model, "tokenizer.json: 134217729 bytes")
