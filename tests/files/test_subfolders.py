"""Sub-folders of a model: what belongs to it is carried and sealed, the model once more is not, and links end."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.families import save
from support.manifests import edit_manifest

import sparsify
from sparsify.backends.packed.unpack import unpack_folder
from sparsify.backends.verify.checkpoint import verify_checkpoint
from sparsify.errors import CheckpointError
from sparsify.files import companions
from sparsify.files.companions import left_out
from sparsify.files.manifest import read_manifest

PARTS = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
]
CARRIED = [
    "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "additional_chat_templates/tool.jinja",
    "modules.json", "speech-lora/adapter_config.json", "speech-lora/adapter_model.safetensors",
]  # fmt: skip


def put(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict) and all(isinstance(value, torch.Tensor) for value in content.values()) and content:
        save_file(content, path)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder of sentence-transformers, with whatever else lies in folders that people publish."""
    folder = save("bert", tmp_path / "model")
    put(folder / "modules.json", PARTS)
    put(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True})
    put(folder / "2_Dense" / "config.json", {"in_features": 32, "out_features": 4})
    # NaN too: it is not read, and not ours to judge.
    put(folder / "2_Dense" / "model.safetensors", {"linear.weight": torch.full((4, 32), float("nan"))})
    put(folder / "additional_chat_templates" / "tool.jinja", "{{ tools }}")
    put(folder / "speech-lora" / "adapter_config.json", {"peft_type": "LORA"})
    put(folder / "speech-lora" / "adapter_model.safetensors", {"a": torch.ones(2)})
    return folder


def below(folder: Path) -> dict[str, bytes]:
    """The files in sub-folders, by their paths."""
    found = (p for p in folder.rglob("*") if p.is_file() and (p.parent != folder or p.name == "modules.json"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@pytest.mark.parametrize(
    "to", ["hf", "packed:choice=smallest", pytest.param("onnx:weights=link", marks=pytest.mark.slow)]
)
def test_what_belongs_to_a_model_is_carried(model: Path, tmp_path: Path, to: str) -> None:
    made = sparsify.compile(model, ["magnitude:2:4"], to=to, output=tmp_path / "out")
    assert made.output is not None
    assert below(made.output) == below(model) and sorted(below(model)) == CARRIED
    digests = read_manifest(made.output)["digests"]
    assert set(CARRIED) <= digests["files"].keys() and not [name for name in digests["headers"] if "/" in name]
    assert not any(name.startswith("linear") for name in digests["tensors"])
    again = sparsify.compile(made.output, ["magnitude:2:4"], output=tmp_path / "again") if to == "hf" else None
    assert again is None or below(tmp_path / "again") == below(model)
    if to.startswith("packed"):
        assert below(unpack_folder(made.output, tmp_path / "back")) == below(model)


@pytest.mark.slow
def test_a_smaller_model_has_them_too(model: Path, tmp_path: Path) -> None:
    ids = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": ids, "labels": ids}]
    sparsify.compile(model, ["llm-pruner:25%"], calibration=batches, output=tmp_path / "out")
    assert below(tmp_path / "out") == below(model)


@pytest.mark.slow
def test_they_are_held_against_what_was_written(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sparsify.compile(model, ["magnitude:2:4"], output=out)
    for name in CARRIED:
        sound = (out / name).read_bytes()
        for content in (None, sound[:-1] + b"!"):
            (out / name).unlink(missing_ok=True)
            if content is not None:
                (out / name).write_bytes(content)
            assert any(name in problem for problem in verify_checkpoint(out).problems)
            with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
                sparsify.load(out)
        sparsify.load(out, check=False)
        (out / name).write_bytes(sound)
    sparsify.load(out)


def test_what_is_added_later_is_nobodys(model: Path, tmp_path: Path) -> None:
    sparsify.compile(model, ["magnitude:2:4"], output=tmp_path / "out")
    put(tmp_path / "out" / "3_Normalize" / "model.safetensors", {"a": torch.ones(1)})
    put(tmp_path / "out" / "onnx" / "model.onnx", "whatever")
    sparsify.load(tmp_path / "out")
    result = verify_checkpoint(tmp_path / "out")
    assert not result.problems


FOREIGN: dict[str, dict[str, Any]] = {
    "onnx/": {"model.onnx": "x", "config.json": {"model_type": "bert"}},
    "original/": {"consolidated.00.pth": "x", "params.json": {}},
    "openvino/": {"openvino_model.xml": "x", "openvino_model.bin": "x"},
    "checkpoint-500/": {"model.safetensors": {"a": torch.ones(1)}, "config.json": {"model_type": "bert"}},
    "training/": {"optimizer.pt": "x"},
    "again/": {"model.safetensors": {"a": torch.ones(1 << 16)}},
    "gguf/": {"params.json": {}},
    "deep/": {"a/b/c/d/e/f/g/h/i/file.json": {}},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_the_model_once_more_is_left_out_and_listed(model: Path, tmp_path: Path, name: str) -> None:
    for file, content in FOREIGN[name].items():
        put(model / name / file, content)
    put(model / "pytorch_model.bin", "x")
    put(model / "consolidated.safetensors", {"a": torch.ones(1)})
    put(model / "params.json", {})
    made = sparsify.compile(model, ["magnitude:2:4"], output=tmp_path / "out")
    assert made.output is not None and sorted(below(made.output)) == CARRIED
    assert made.manifest["left_out"] == sorted(["consolidated.safetensors", "params.json", "pytorch_model.bin", name])
    assert any("left out" in note and name in note for note in made.notes)
    assert not (made.output / "params.json").exists()


def test_a_module_may_hold_whatever_it_likes(model: Path) -> None:
    put(model / "2_Dense" / "pytorch_model.bin", "x")
    put(model / "2_Dense" / "model.onnx", "x")
    assert left_out(model) == ["model.safetensors"]
    put(model / "modules.json", "[{]")
    assert left_out(model) == ["2_Dense/", "model.safetensors"]


def test_many_files_are_no_part_of_a_model(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(companions, "MAX_FILES", 2)
    put(model / "venv" / "a.txt", "x")
    put(model / "venv" / "lib" / "b.txt", "x")
    assert left_out(model) == ["model.safetensors"]
    put(model / "venv" / "lib" / "c.txt", "x")
    assert left_out(model) == ["model.safetensors", "venv/"]


@pytest.mark.parametrize("kind", ["file", "fifo", "nothing", "folder", "folder inside"])
def test_links_in_sub_folders_are_not_followed(model: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key.txt").write_text("private")
    place = model / "1_Pooling" / "more.json"
    if kind == "fifo":
        os.mkfifo(place)
    elif kind.startswith("folder"):
        (model / "linked" if kind == "folder" else model / "1_Pooling" / "linked").symlink_to(tmp_path / "private")
    else:
        place.symlink_to(tmp_path / "private" / "key.txt" if kind == "file" else "nothing")
    if not kind.startswith("folder"):
        with pytest.raises(CheckpointError, match=r"more\.json"):
            sparsify.compile(model, ["magnitude:2:4"], output=tmp_path / "out")
        return
    made = sparsify.compile(model, ["magnitude:2:4"], output=tmp_path / "out")
    assert made.output is not None and not any("key.txt" in name for name in below(made.output))
    assert made.manifest["left_out"] == ["linked/" if kind == "folder" else "1_Pooling/"]


def test_hidden_ones_stay_where_they_are(model: Path, tmp_path: Path) -> None:
    for name in (".git/config", ".cache/x", "__pycache__/x.pyc", "1_Pooling/.hidden", "1_Pooling/.git/config"):
        put(model / name, "x")
    sparsify.compile(model, ["magnitude:2:4"], output=tmp_path / "out")
    assert sorted(below(tmp_path / "out")) == CARRIED


def test_a_list_of_files_that_leads_elsewhere(model: Path, tmp_path: Path) -> None:
    sparsify.compile(model, ["magnitude:2:4"], output=tmp_path / "out")
    (tmp_path / "private.json").write_text("{}")
    names = {"../private.json": "00", "1_Pooling/../../private.json": "00"}
    edit_manifest(tmp_path / "out", lambda m: m["digests"]["files"].update(names))
    with pytest.raises(CheckpointError, match="names it, and it is not there"):
        sparsify.load(tmp_path / "out")


def test_a_folder_called_packed(model: Path, tmp_path: Path) -> None:
    put(model / "packed" / "notes.txt", "mine")
    made = sparsify.compile(model, ["magnitude:2:4"], to="packed:choice=smallest", output=tmp_path / "out")
    assert made.output is not None and (made.output / "packed" / "notes.txt").read_text() == "mine"


def test_the_room_that_they_take_is_asked_for(model: Path) -> None:
    put(model / "2_Dense" / "big.safetensors", {"a": torch.ones(1 << 12)})
    assert companions.size_of_companions(model) > 4 << 12
