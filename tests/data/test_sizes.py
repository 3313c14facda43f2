"""Both sides of every size at which data are cut into other batches: the samples stay the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.families import build

from sparsify.data import generate, inputs
from sparsify.data.batches import load_calibration
from sparsify.frontend.source import Source, open_source
from sparsify.quality import perplexity as evaluation
from sparsify.quality.perplexity import perplexity


@pytest.fixture(scope="module")
def llama() -> Source:
    return open_source(build("llama"))


@pytest.mark.parametrize(
    ("tokens", "rows"),
    [(1, 1), (15, 1), (16, 1), (31, 1), (32, 2), (48, 3), (63, 3), (64, 3), (95, 3), (96, 6), (1 << 20, 6)],
)
def test_as_many_rows_at_once_as_fit_and_divide_them(
    tokens: int, rows: int, llama: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(3, 60, (6, 16))
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    monkeypatch.setattr(inputs, "TOKENS_AT_ONCE", tokens)
    found = load_calibration(str(tmp_path / "ids.safetensors"), llama, samples=6, sequence_length=16).batches
    assert [len(batch["input_ids"]) for batch in found] == [rows] * (6 // rows)
    assert torch.equal(torch.cat([batch["input_ids"] for batch in found]), ids)


def test_sequences_are_sampled_some_at_a_time(llama: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many at once, there are as many as were asked for; the first ones are the same."""
    monkeypatch.setattr(generate, "_BATCH", 3)
    seven, three = (generate.sample_from_model(llama, count, 6, 0) for count in (7, 3))
    assert seven.shape == (7, 6) and three.shape == (3, 6)
    assert torch.equal(seven[:3], three) and len({tuple(row) for row in seven.tolist()}) == 7


@pytest.mark.parametrize("tokens", [1, 32])
def test_perplexity_is_the_same_however_many_windows_run_at_once(
    tokens: int, llama: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = torch.randint(3, 60, (6, 16), generator=torch.Generator().manual_seed(0))
    usual = perplexity(llama, windows)
    monkeypatch.setattr(evaluation, "_TOKENS_AT_ONCE", tokens)
    assert perplexity(llama, windows) == pytest.approx(usual, rel=1e-6)
