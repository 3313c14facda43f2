"""What is given from Python where something else is meant: a sentence, never an error of Python's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsify
from sparsify.errors import SpecError

IDS = torch.randint(3, 60, (4, 24), generator=torch.Generator().manual_seed(3))

WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "report of nothing": (lambda model: sparsify.report(None), "a page: NoneType, which names no model"),  # type: ignore[arg-type]
    "report of a number": (lambda model: sparsify.report(3), "a page: int"),  # type: ignore[arg-type]
    "diff of numbers": (lambda model: sparsify.diff(1, 2), "comparing two models: int"),  # type: ignore[arg-type]
    "a bare budget": (
        lambda model: sparsify.search(model, "magnitude", budget=1.05, data="a.txt"),  # type: ignore[arg-type]
        "budget 1.05: float. Write perplexity<=1.05",
    ),
    "texts that judge": (
        lambda model: sparsify.search(model, "magnitude", budget="perplexity<=1.05", data=["abc"]),  # type: ignore[arg-type]
        "data that judge: list, where a source is named",
    ),
    "a number of tasks": (lambda model: sparsify.evaluate(model, tasks=3), "tasks 3: int"),  # type: ignore[call-overload]
    "a limit in words": (
        lambda model: sparsify.evaluate(model, tasks="boolq", limit="x"),  # type: ignore[call-overload]
        "--limit x: str, no whole number",
    ),
    "windows of tasks": (
        lambda model: sparsify.evaluate(model, tasks="boolq", windows=2),
        "--windows: tasks alone.*--limit",
    ),
    "another kind of result": (
        lambda model: sparsify.evaluate(model, IDS).differences(3),
        "comparing two evaluations: int",
    ),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", WRONG)
def test_it_is_a_sentence(case: str, folder: Callable[[str], Path]) -> None:
    call, said = WRONG[case]
    with pytest.raises(SpecError, match=said):
        call(folder("llama"))


def test_a_result_is_a_model_too(folder: Callable[[str], Path], tmp_path: Path) -> None:
    kept = sparsify.compile(folder("llama"), "magnitude:2:4")
    with pytest.raises(SpecError, match=r"memory alone\. Write it first: result\.save\(folder\)"):
        sparsify.report(kept, tmp_path / "page.html")
    with pytest.raises(SpecError, match="comparing two models: a result that lies in memory alone"):
        sparsify.diff(folder("llama"), kept)
    kept.save(tmp_path / "out")
    assert sparsify.report(kept, tmp_path / "page.html").is_file()
    assert not sparsify.diff(folder("llama"), kept).same
