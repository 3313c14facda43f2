"""``sparsify diff``: what differs between two folders, whatever form each has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command_line import sparsify as command_line
from support.families import save
from support.folders import SMALLEST
from support.manifests import edit_manifest
from support.quantized import gguf

import sparsify
from sparsify.errors import CheckpointError, SpecError

WORDS: dict[str, Any] = {"calibration": "random", "samples": 2, "sequence_length": 16}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One dense model, and what became of it in several ways."""
    root = tmp_path_factory.mktemp("diff")
    dense = save("llama", root / "dense")
    sparsify.compile(dense, "wanda:2:4", ignore="*.q_proj", output=root / "wanda", **WORDS)
    sparsify.compile(dense, "sparsegpt:50%", seed=1, output=root / "sparsegpt", **WORDS)
    sparsify.compile(dense, "magnitude:2:4", output=root / "hf")
    sparsify.compile(dense, "magnitude:2:4", output=root / "packed", to=SMALLEST)
    return root


def test_the_dense_model_against_a_pruned_one(models: Path) -> None:
    found = sparsify.diff(models / "dense", models / "wanda")
    one, other = (load_file(models / name / "model.safetensors") for name in ("dense", "wanda"))
    assert {t.name for t in found.tensors} == one.keys() == other.keys()
    for tensor in found.tensors:
        a, b = one[tensor.name], other[tensor.name]
        assert tensor.same is torch.equal(a, b) and tensor.shape_a == tensor.shape_b == tuple(a.shape)
        assert (tensor.zeros_a, tensor.zeros_b) == (int((a == 0).sum()), int((b == 0).sum()))
    zeros, numbers = sum(int((t == 0).sum()) for t in other.values()), sum(t.numel() for t in other.values())
    assert found.whole.share_b == zeros / numbers and found.whole.numbers_a == numbers
    pruned = {f"{site.name}.weight" for site in _sites(models / "wanda")}
    assert {*found.dense_in_a} == pruned and found.dense_in_b == [] and "q_proj" not in "".join(pruned)
    kinds, blocks = ({group.name: group for group in own} for own in (found.kinds, found.blocks))
    assert kinds["mlp.up_proj"].share_b == 0.5 and kinds["self_attn.q_proj"].share_b == 0.0
    assert kinds["self_attn.q_proj"].plain and not kinds["mlp.up_proj"].plain
    assert blocks.keys() == {"model.layers.0", "model.layers.1", "outside the blocks"}
    for own in (kinds, blocks):
        assert sum(group.zeros_b for group in own.values()) == zeros
        assert sum(group.numbers_b for group in own.values()) == numbers
    assert not found.same and found.recipe == [] and [step["command"] for step in found.steps_b] == ["compile"]
    assert found.whole.overlap.relative_move == 0.0, "wanda moves nothing"


def _sites(folder: Path) -> list[Any]:
    from types import SimpleNamespace

    manifest = json.loads((folder / "sparsify.json").read_text())
    return [SimpleNamespace(name=site["name"]) for site in manifest["passes"][0]["sites"]]


def test_two_methods(models: Path) -> None:
    found = sparsify.diff(models / "wanda", models / "sparsegpt")
    assert found.dense_in_a == ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"]
    up = next(group for group in found.kinds if group.name == "mlp.up_proj")
    assert up.overlap.zeros_shared is not None and 0.5 < up.overlap.zeros_shared < 1.0
    assert up.overlap.relative_move is not None and up.overlap.relative_move > 0.01
    said = {change.what: (change.a, change.b) for change in found.recipe}
    assert said["pass 1.spec"] == ("wanda:2:4", "sparsegpt:50%") and said["calibration.seed"] == (0, 1)
    assert said["pass 1.ignore"] == (["*.q_proj"], []) and "versions.torch" not in said
    assert found.shared_steps == 0 and len(found.steps_a) == len(found.steps_b) == 1


def test_the_same_folder_twice_and_a_copy_of_it(models: Path, tmp_path: Path) -> None:
    found = sparsify.diff(models / "hf", models / "." / "hf")
    assert found.same and found.one_folder and "one folder: all" in found.verdict
    shutil.copytree(models / "hf", tmp_path / "copy")
    (tmp_path / "copy" / "notes.txt").write_text("mine")
    found = sparsify.diff(models / "hf", tmp_path / "copy")
    assert found.same and not found.one_folder and found.files_b == ["notes.txt"] and found.shared_steps == 1
    state = load_file(tmp_path / "copy" / "model.safetensors")
    state["model.norm.weight"] += 1
    del state["model.layers.0.mlp.up_proj.weight"]
    save_file({**state, "extra": torch.zeros(2, dtype=torch.int64)}, tmp_path / "copy" / "model.safetensors")
    found = sparsify.diff(models / "hf", tmp_path / "copy", check=False)
    assert found.only_a == ["model.layers.0.mlp.up_proj.weight"] and found.only_b == ["extra"]
    assert [t.name for t in found.tensors if not t.same] == [
        "model.layers.0.mlp.up_proj.weight",
        "model.norm.weight",
        "extra",
    ]
    with pytest.raises(CheckpointError, match=r"up_proj.weight: .* does not hold it, where sparsify.json says"):
        sparsify.diff(models / "hf", tmp_path / "copy")


@pytest.mark.slow
def test_folders_of_every_form_hold_the_same(models: Path, tmp_path: Path) -> None:
    forms = {"onnx": "onnx", "packed onnx": "onnx:weights=packed"}
    for name, to in forms.items():
        sparsify.compile(models / "dense", "magnitude:2:4", output=tmp_path / name, to=to)
    held = sparsify.diff(models / "hf", models / "packed")
    assert all(tensor.same for tensor in held.tensors) and not held.same
    assert [change.what for change in held.config] == [
        "quantization_config"
    ] and held.whole.share_a == held.whole.share_b
    for name in forms:
        for place in (tmp_path / name, tmp_path / name / "model.onnx"):
            found = sparsify.diff(models / "hf", place)
            (weights := {t.name: t for t in found.tensors}).pop("lm_head.weight", None)
            assert all(tensor.same for tensor in weights.values()) and found.whole.zeros_b > 0, name


def test_a_smaller_model_is_told_of_and_not_compared(models: Path, tmp_path: Path) -> None:
    sparsify.compile(models / "dense", "llm-pruner:50%,widths=ragged", output=tmp_path / "smaller", **WORDS)
    found = sparsify.diff(models / "dense", tmp_path / "smaller")
    up = next(t for t in found.tensors if t.name == "model.layers.0.mlp.up_proj.weight")
    assert up in found.reshaped and up.overlap is None and up.shape_a == (64, 32) and up.shape_b is not None
    assert up.zeros_a == up.zeros_b == 0 and found.whole.numbers_b < found.whole.numbers_a
    done = command_line("diff", models / "dense", tmp_path / "smaller")
    assert "shapes differ, so that numbers are not compared" in done.stdout and done.returncode == 0


def test_dtypes_differ(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "dense", tmp_path / "half")
    state = load_file(tmp_path / "half" / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in state.items()}, tmp_path / "half" / "model.safetensors")
    found = sparsify.diff(models / "dense", tmp_path / "half")
    assert {(t.dtype_a, t.dtype_b) for t in found.tensors} == {("float32", "bfloat16")} and not found.same
    assert found.whole.overlap.relative_move is not None and 0 < found.whole.overlap.relative_move < 0.01


def test_names(models: Path) -> None:
    found = sparsify.diff(models / "dense", models / "hf", only="*.mlp.*", ignore=["re:.*layers.0"])
    assert {t.name for t in found.tensors} == {
        f"model.layers.1.mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")
    }
    assert found.whole.name == "all of these" and found.whole.share_b == 0.5
    done = command_line("diff", models / "dense", models / "hf", "--only", "*.qproj")
    assert done.returncode == 2 and "*.q_proj" in done.stderr
    with pytest.raises(SpecError, match="--ignore"):
        sparsify.diff(models / "dense", models / "hf", ignore="nothing.of.the.kind")


def test_what_cannot_be_compared(models: Path, tmp_path: Path) -> None:
    def refused(place: Path) -> CheckpointError:
        with pytest.raises(CheckpointError) as raised:
            sparsify.diff(models / "dense", place)
        return raised.value

    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty").found == "no weights that are read here"
    assert "GGUF" in refused(tmp_path / "empty").do
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert "LoRA" in refused(tmp_path / "adapter").found
    assert "no such folder" in str(refused(tmp_path / "none"))
    assert "no tensor of one name" in str(refused(save("gpt2", tmp_path / "gpt2")))
    (models / "dense" / "model.safetensors").rename(models / "away")
    try:
        assert "model.safetensors" in str(refused(models / "hf"))
    finally:
        (models / "away").rename(models / "dense" / "model.safetensors")


def test_a_gguf_file_against_the_model_that_it_was_made_of(models: Path, tmp_path: Path) -> None:
    found = sparsify.diff(models / "dense", gguf(tmp_path / "model.gguf", kind="F16"))
    assert not found.only_b and not found.reshaped and len(found.tensors) > 10
    assert found.whole.overlap.relative_move is not None and found.whole.overlap.relative_move < 0.01
    assert sparsify.diff(tmp_path / "model.gguf", tmp_path / "model.gguf").same


def test_figures_stand_side_by_side(models: Path, tmp_path: Path) -> None:
    judged = {"data": "t", "windows": 2, "sequence_length": 8, "dense": 8.0, "pruned": 12.0, "verdict": "worse"}
    for name, sha in (("one", "aa"), ("two", "bb")):
        shutil.copytree(models / "hf", tmp_path / name)
        edit_manifest(tmp_path / name, lambda manifest, sha=sha: manifest.update(evaluation={**judged, "sha256": sha}))
    done = command_line("diff", tmp_path / "one", tmp_path / "two")
    assert done.stdout.count("1.500") == 2 and "On other text" in done.stdout
    assert "On other text" not in command_line("diff", tmp_path / "one", tmp_path / "one").stdout
    assert command_line("diff", tmp_path / "one", models / "hf").stdout.count("1.500") == 1


def test_the_command(models: Path) -> None:
    done = command_line("diff", models / "dense", models / "wanda", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and not found["same"] and found["whole"]["share_b"] > 0.1
    assert {kind["name"]: kind["share_b"] for kind in found["kinds"]}["mlp.up_proj"] == 0.5
    done = command_line("diff", models / "dense", models / "wanda")
    assert done.returncode == 0 and "mlp.up_proj ×2" in done.stdout and "dense in A, not in B" in done.stdout
    done = command_line("diff", models / "hf", models / "hf")
    assert done.returncode == 0 and "one folder: all" in done.stdout
