"""``sparsify tune`` with a teacher and with targets, at the command line: what is said and written, and exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.command_line import Done
from support.command_line import sparsify as command
from support.families import deep, save
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import sparsify
from sparsify.errors import CheckpointError
from sparsify.tuning.tune import tune as run_tuning

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``dense``, ``sparse`` (it at 2:4), ``other`` (of another vocabulary), ``gpt2`` (of fused layers), and ids."""
    folder = tmp_path_factory.mktemp("models")
    deep("llama", 2).save_pretrained(folder / "dense")
    sparsify.compile(folder / "dense", ["magnitude:2:4"], output=folder / "sparse")
    other = deep("llama", 1)
    other.resize_token_embeddings(80)
    other.save_pretrained(folder / "other")
    save("gpt2", folder / "gpt2")
    ids = torch.randint(3, 60, (4000,), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, folder / "ids.safetensors")
    return folder


def tune(here: Path, out: Path, *words: object, model: str = "sparse", ids: Path | None = None) -> Done:
    few = ("--steps", 2, "--batch", 4, "--samples", 8, "--sequence-length", 32)
    return command("tune", here / model, "--data", ids or here / "ids.safetensors", "-o", out, *few, *words)


def test_a_teacher_and_targets(here: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = tune(here, out, "--teacher", here / "dense", "--targets", "q,v")
    assert done.returncode == 0, done.stderr
    assert "taught by dense, of perplexity" in done.stdout and "the zeros of 14 weights were held" in done.stdout
    assert "LoRA on model.layers.*.self_attn.q_proj, model.layers.*.self_attn.v_proj" in done.stdout
    said = json.loads((out / "sparsify.json").read_text())["tuned"]
    assert said["teacher"]["name"] == "dense" and said["recipe"]["targets"] == "q,v"
    assert command("verify", out).returncode == 0


def test_a_teacher_whose_head_is_padded(here: Path, tmp_path: Path) -> None:
    """Rows that no token has are said, not learnt; without a tokenizer nobody knows that they are padding."""
    vocabulary = {f"w{number}": number for number in range(64)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, "w3")), unk_token="w3")
    for name in ("dense", "other"):
        shutil.copytree(here / name, tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    sparsify.compile(tmp_path / "dense", ["magnitude:2:4"], output=tmp_path / "sparse")
    done = tune(tmp_path, tmp_path / "out", "--teacher", tmp_path / "other", ids=here / "ids.safetensors")
    assert done.returncode == 0, done.stderr
    assert "of its 80 predictions the first 64 were learnt" in " ".join(done.stdout.split())
    said = json.loads((tmp_path / "out" / "sparsify.json").read_text())["tuned"]["teacher"]
    assert said["name"] == "other" and said["predictions"] == [80, 64]


def test_as_json(here: Path, tmp_path: Path) -> None:
    done = tune(here, tmp_path / "out", "--teacher", here / "dense", "--method", "full", "--json")
    said = json.loads(done.stdout)
    assert done.returncode == 0 and said["teacher"]["name"] == "dense" and len(said["losses"]) == 2


@pytest.mark.parametrize(
    ("words", "code", "found"),
    [
        (["--teacher", "sparse"], 2, "the very weights that are tuned"),
        (["--teacher", "other"], 2, "a vocabulary of 80 tokens, and 64"),
        (["--teacher", "none"], 1, "none"),
        (["--distill", "0.5"], 2, "no teacher"),
        (["--distill", "1.5"], 2, "no share above 0"),
        (["--targets", "lm_head"], 2, "names no linear layer"),
        (["--targets", "q,,v"], 2, "an empty name"),
        (["--targets", "q", "--method", "full"], 2, "targets are what LoRA is put on"),
    ],
)
def test_what_is_refused(here: Path, tmp_path: Path, words: list[str], code: int, found: str) -> None:
    out = tmp_path / "out"
    given = [here / word if before == "--teacher" else word for before, word in zip(["", *words], words, strict=False)]
    done = tune(here, out, *given)
    assert done.returncode == code and found in " ".join(done.stderr.split()) and "Traceback" not in done.stderr
    assert not out.exists() and not (tmp_path / "out.tuning").exists()


def test_targets_of_a_fused_layer(here: Path, tmp_path: Path) -> None:
    done = tune(here, tmp_path / "out", "--targets", "q,v", model="gpt2")
    assert done.returncode == 2 and "--targets c_attn" in done.stderr


def test_nothing_to_go_on_from(here: Path, tmp_path: Path) -> None:
    done = tune(here, tmp_path / "out", "--resume")
    assert done.returncode == 1 and "no state to read there" in " ".join(done.stderr.split())


def test_nothing_to_go_on_from_is_said_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no state to read there"):
        run_tuning(tmp_path / "no model", "no data", tmp_path / "out", resume=True)
