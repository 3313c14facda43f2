"""Tuning in the history and on the card: merged, and as an adapter."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from support.command_line import sparsify as command
from support.families import deep

import sparsify
from sparsify.files.ledger import Ledger
from sparsify.files.manifest import read_manifest
from sparsify.provenance.history import digest_of_sums
from sparsify.tuning.recipe import Recipe
from sparsify.tuning.tune import tune

pytest.importorskip("peft")
QUICK = Recipe(steps=1, batch=4, micro=4, samples=8, length=16, warmup=0)


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    """A model of one block with a card, pruned, and text beside it."""
    dense = tmp_path / "dense"
    deep("llama", 1).save_pretrained(dense)
    (dense / "README.md").write_text("---\nlicense: mit\n---\n")
    save_file({"input_ids": torch.arange(4000) % 57 + 3}, tmp_path / "ids.safetensors")
    sparsify.compile(dense, "magnitude:2:4", output=tmp_path / "pruned")
    return tmp_path / "pruned"


def test_a_tune_is_a_step_like_others(pruned: Path, tmp_path: Path) -> None:
    data = str(tmp_path / "ids.safetensors")
    done = tune(pruned, data, tmp_path / "tuned", QUICK)
    sparsify.compile(tmp_path / "tuned", "magnitude:75%", output=tmp_path / "more")
    first, second, third = read_manifest(tmp_path / "more")["history"]
    assert [run["command"] for run in (first, second, third)] == ["compile", "tune", "compile"]
    assert second["source"] == {"name": "pruned", "weights": digest_of_sums(Ledger.of(pruned).tensors)}
    assert second["perplexity"] == list(done.perplexity) and second["data"] == done.data
    assert second["training"]["rank"] == 8
    assert third["source"]["weights"] == digest_of_sums(Ledger.of(tmp_path / "tuned").tensors)
    assert not {"losses", "seconds", "output"} & second.keys()
    card = (tmp_path / "more" / "README.md").read_text()
    before, after = done.perplexity
    assert f"before and after step 2: {before:.3f} → {after:.3f}." in card
    header = ModelCard((tmp_path / "tuned" / "README.md").read_text()).data.to_dict()
    assert header["tags"] == ["sparsify", "pruned", "2:4", "tune"] and header["license"] == "mit"
    assert header["base_model"] == "dense"
    # What an earlier step did is told by every later card, and its commands follow each other.
    later = ModelCard(card)
    assert later.data.to_dict()["tags"] == ["sparsify", "pruned", "2:4", "75%", "tune"]
    lines = [line.split() for line in card.splitlines() if line.startswith("sparsify compile")]
    assert lines and all(line[-2] == "-o" for line in lines) and lines[-1][-1] == "OUT"


def test_the_command_of_a_tune_is_one(pruned: Path, tmp_path: Path) -> None:
    words = ["--data", tmp_path / "ids.safetensors", "--steps", 1, "--batch", 4, "--micro", 4, "--samples", 8]
    words += ["--sequence-length", 16, "--rank", 2, "--teacher", tmp_path / "dense"]
    done = command("tune", pruned, *words, "-o", tmp_path / "tuned")
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "tuned" / "README.md").read_text()
    (line,) = [line for line in card.splitlines() if line.startswith("sparsify tune")]
    done = command(*shlex.split(line)[1:-1], tmp_path / "again")
    assert done.returncode == 0, done.stderr
    one, two = (read_manifest(tmp_path / name)["history"] for name in ("tuned", "again"))
    assert one == two and one[1]["teacher"]["name"] == "dense"


def test_an_adapter_has_a_card_of_its_own(pruned: Path, tmp_path: Path) -> None:
    tune(pruned, str(tmp_path / "ids.safetensors"), tmp_path / "adapter", QUICK, adapter=True)
    card = (tmp_path / "adapter" / "README.md").read_text()
    header = ModelCard(card).data.to_dict()
    assert header["base_model"] == "pruned" and header["library_name"] == "peft" and "lora" in header["tags"]
    assert "More Information Needed" not in card and "AutoPeftModelForCausalLM" in card
    assert len(read_manifest(tmp_path / "adapter")["history"]) == 2
    assert not (tmp_path / "adapter" / "README.dense.md").exists()
