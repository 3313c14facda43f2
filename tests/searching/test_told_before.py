"""What a search will cost, and that its budget is out of reach, is told before the long part."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save_file

import sparsify
from sparsify.errors import CalibrationError, SpecError
from sparsify.method.spec import parse_pass
from sparsify.searching import judge, workbench
from sparsify.searching.search import parse_method
from sparsify.searching.strategy.rounds import by_parts, by_percentages, most_trials

WORDS = {"samples": 4, "sequence_length": 32, "windows": 4}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "held.safetensors"
    save_file({"input_ids": torch.randint(3, 60, (3000,), generator=torch.Generator().manual_seed(0))}, path)
    return path


def test_a_perplexity_below_the_dense_one_is_refused_before_the_model_writes_text(
    folder: Callable[[str], Path], text: Path
) -> None:
    drawn = patch.object(workbench, "load_calibration", side_effect=AssertionError("drawn"))
    with drawn, pytest.raises(CalibrationError, match="the dense model itself has"):
        sparsify.search(folder("llama"), "wanda", budget="perplexity<=2abs", data=text, calibration="self", **WORDS)


def test_calibration_that_is_not_there_is_told_before_the_text_is_read(
    folder: Callable[[str], Path], text: Path
) -> None:
    read = patch.object(judge.Judge, "perplexity", side_effect=AssertionError("read"))
    with read, pytest.raises(CalibrationError, match=r"nowhere\.txt"):
        sparsify.search(folder("llama"), "wanda", budget="perplexity<=2", data=text, calibration="nowhere.txt", **WORDS)


@pytest.mark.parametrize(
    ("spec", "runs"), [("magnitude", "no calibration"), ("wanda", "calibration run over 4 × 32 tokens")]
)
def test_what_it_costs_is_said_first(folder: Callable[[str], Path], text: Path, spec: str, runs: str) -> None:
    said: list[str] = []
    found = sparsify.search(folder("llama"), spec, budget="perplexity<=1.01", data=text, tell=said.append, **WORDS)
    assert said[0].startswith("dense: perplexity")
    assert runs in said[1] and "a reading of 4 windows" in said[1] and "KiB of pruned weights" in said[1], said[1]
    most = re.match(r"at most (\d+) trials", said[1])
    assert most is not None and len(found.trials) <= int(most[1])
    assert all(re.search(r", \d+\.\d s$", line) for line in said[2:]), said[2:]


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_there_are_never_more_trials_than_are_said(count: int, fixed: bool) -> None:
    """Whatever the losses are: each setting's is drawn, so that no curve is as it should be."""
    sizes = {f"kind{n}": 100 + n for n in range(count)}
    for seed in range(20):
        tried: set[tuple[int, ...]] = set()
        drawn = torch.Generator().manual_seed(seed)

        def excess(levels: Mapping[str, int], words: str, tried: set[tuple[int, ...]] = tried) -> float:
            tried.add(tuple(levels.values()))
            return float(torch.rand((), generator=drawn)) - 0.5  # noqa: B023

        (by_parts if fixed else by_percentages)(excess, sizes, -0.5)
        assert 0 < len(tried) <= most_trials(count, fixed)


@pytest.mark.parametrize("text", ["refine", "refine:epochs=2", "permute", "permute:2:4", "round", "llm-pruner:25%"])
def test_other_kinds_of_passes_are_told_as_such_with_a_pattern_or_without(text: str) -> None:
    name = text.partition(":")[0]
    with pytest.raises(SpecError, match=f"searching with {name}: a pass that does not prune weight by weight"):
        parse_method(text)
    with pytest.raises(SpecError, match=f"sensitivity to {name}: a pass that does not prune weight by weight"):
        sparsify.sensitivity("nowhere", text, data="nowhere.txt")


@pytest.mark.parametrize("text", ["wanda", "wanda,norm=l1", "wanda:norm=l1"])
def test_a_pattern_that_is_missing_is_written_where_it_belongs(text: str) -> None:
    with pytest.raises(SpecError, match="no pattern") as caught:
        sparsify.sensitivity("nowhere", text, data="nowhere.txt")
    written = str(caught.value).partition("Write ")[2].partition(" or ")[0]
    assert str(parse_pass(written).pattern) == "2:4"  # type: ignore[attr-defined]
