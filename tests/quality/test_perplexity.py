from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.families import build

from sparsify.context import Context, Progress
from sparsify.errors import CalibrationError, TraceError
from sparsify.evaluation.evaluate import evaluate
from sparsify.frontend.source import open_source
from sparsify.quality.perplexity import perplexity


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "mamba", "mixtral", "gemma3"])
def test_perplexity_is_the_papers(family: str, folder: Callable[[str], Path]) -> None:
    """nll = mean · L per window, exp(sum / (windows · L)), with transformers' own forward."""
    windows = torch.randint(3, 60, (6, 16), generator=torch.Generator().manual_seed(0))
    model = type(build(family)).from_pretrained(folder(family)).eval()
    total = 0.0
    with torch.no_grad():
        for row in windows:
            logits = model(row[None], use_cache=False).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, row[1:])) * 16
    assert perplexity(open_source(folder(family)), windows) == pytest.approx(math.exp(total / (6 * 16)), rel=1e-5)


def test_held_out_text_through_the_tokenizer(bundled: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("import os\nprint(os.getcwd())\n" * 60)
    result = evaluate(bundled, str(tmp_path / "a.txt"), sequence_length=64, windows=3)
    assert result.windows == 3 and result.sequence_length == 64 and 1 < result.perplexity < 4096


def test_only_causal_models_have_one(folder: Callable[[str], Path]) -> None:
    windows = torch.randint(3, 60, (2, 16))
    for family in ("bert", "t5"):
        with pytest.raises(TraceError, match="not a causal language model"):
            perplexity(open_source(folder(family)), windows)


def test_too_little_text_and_wrong_ids(bundled: Path, tmp_path: Path, folder: Callable[[str], Path]) -> None:
    (tmp_path / "a.txt").write_text("x = 1\n")
    with pytest.raises(CalibrationError, match="tokens in all"):
        evaluate(bundled, str(tmp_path / "a.txt"))
    with pytest.raises(CalibrationError, match="token id 64 of the data: the model's vocabulary has 64 tokens"):
        perplexity(open_source(folder("llama")), torch.full((1, 8), 64))


def test_the_observer_is_told_of_every_region(folder: Callable[[str], Path]) -> None:
    told: list[Progress] = []
    context = Context(observe=told.append)
    perplexity(open_source(folder("llama")), torch.randint(3, 60, (4, 16)), context)
    # Two blocks, and what comes before them; all windows are one batch.
    assert [(step.done, step.total, step.count) for step in told] == [
        (1, 3, "layer 2/3"), (2, 3, "layer 3/3"), (3, 3, "layer 3/3"),
    ]  # fmt: skip
    assert {(step.phase, step.what, step.tokens) for step in told} == {("evaluating", "4 windows", 64)}
