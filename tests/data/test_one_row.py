"""Classifiers and reward models without a padding token read one sequence at a time, everywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from support.families import GQA, TOKENS

import sparsify
from sparsify.data.batches import load_calibration
from sparsify.data.inputs import one_row_alone
from sparsify.errors import TraceError
from sparsify.evaluation.compare import compare
from sparsify.evaluation.evaluate import evaluate
from sparsify.frontend.source import open_source

SMALL = GQA | {"num_hidden_layers": 1}
KINDS: dict[str, Callable[[Any], Any]] = {
    "llama": lambda pad: hf.LlamaForSequenceClassification(hf.LlamaConfig(**SMALL, num_labels=1, pad_token_id=pad)),
    "gpt2": lambda pad: hf.GPT2ForSequenceClassification(
        hf.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=64, n_positions=64, pad_token_id=pad, **TOKENS)
    ),
}


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("ids") / "ids.safetensors"
    save_file({"ids": torch.randint(5, 60, (900,), generator=torch.Generator().manual_seed(0))}, path)
    return str(path)


def saved(kind: str, folder: Path, pad: int | None = None) -> Path:
    torch.manual_seed(0)
    KINDS[kind](pad).eval().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_is_pruned(kind: str, ids: str, tmp_path: Path) -> None:
    model = saved(kind, tmp_path / "model")
    with pytest.raises(ValueError, match="batch sizes > 1"):
        hf.AutoModelForSequenceClassification.from_pretrained(model)(torch.zeros(2, 4, dtype=torch.long))
    options: dict[str, Any] = {"calibration": ids, "samples": 4, "sequence_length": 16}
    assert sparsify.compile(model, ["wanda:2:4"], dry_run=True, **options).runs[0].targets
    made = sparsify.compile(model, ["wanda:2:4"], output=tmp_path / "out", **options)
    assert made.calibration is not None
    assert [len(batch["input_ids"]) for batch in made.calibration.batches] == [1] * 4
    network = hf.AutoModelForSequenceClassification.from_pretrained(model).eval()
    # One row or several, tokens are the same: those of a model that pads are its norms.
    padded = load_calibration(ids, open_source(saved(kind, tmp_path / "padded", 0)), samples=4, sequence_length=16)
    assert len(padded.batches) == 1 and torch.equal(
        torch.cat([batch["input_ids"] for batch in made.calibration.batches]), padded.batches[0]["input_ids"]
    )
    assert network.config.pad_token_id is None


def test_with_batches_of_ones_own(ids: str, tmp_path: Path) -> None:
    source = open_source(saved("llama", tmp_path / "model"))
    found = load_calibration([torch.randint(5, 60, (3, 8))] * 2, source)
    assert [len(batch["input_ids"]) for batch in found.batches] == [1] * 6
    found = load_calibration([{"input_ids": torch.randint(5, 60, (3, 8)), "attention_mask": torch.ones(3, 8)}], source)
    assert [len(batch["attention_mask"]) for batch in found.batches] == [1] * 3


def test_compare_and_what_eval_says(ids: str, tmp_path: Path) -> None:
    model = saved("llama", tmp_path / "model")
    result = compare(model, ["wanda:2:4"], calibration=ids, samples=2, sequence_length=16)
    assert result.rows[1].error is not None and result.rows[1].perplexity is None
    with pytest.raises(TraceError, match="not a causal language model"):
        evaluate(model, ids, sequence_length=16, windows=8)


def test_which_models_do(folder: Callable[[str], Path], tmp_path: Path) -> None:
    assert not any(one_row_alone(open_source(folder(family))) for family in ("llama", "gpt2", "bert", "t5", "vit"))
    assert one_row_alone(open_source(saved("llama", tmp_path / "a")))
    assert not one_row_alone(open_source(saved("llama", tmp_path / "b", 0)))
