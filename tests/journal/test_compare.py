"""A comparison that was interrupted keeps the passes that it had finished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.families import deep
from support.interrupted import IDS, hidden, interrupted_after

from sparsify.errors import CheckpointError, SpecError
from sparsify.evaluation.compare import compare
from sparsify.journal.left import left_of

SPECS = ["wanda:2:4", "permute:2:4+wanda:2:4", "magnitude:50%"]


def said(out: Path) -> dict[str, Any]:
    """What was written, but for times and memory."""
    found: dict[str, Any] = json.loads((out / "compare.json").read_text())
    for row in found["rows"]:
        del row["seconds"], row["memory"]
    return found


@pytest.mark.slow
def test_it_goes_on(tmp_path: Path) -> None:
    deep("llama", 1).save_pretrained(tmp_path / "model")
    given: dict[str, Any] = {"model": tmp_path / "model", "calibration": IDS}
    with interrupted_after(0) as parts:
        compare(passes=SPECS, output=tmp_path / "whole", **given)
    assert parts == [4] and not hidden(tmp_path)
    out = tmp_path / "out"
    with interrupted_after(3), pytest.raises(KeyboardInterrupt):
        compare(passes=SPECS, output=out, **given)
    assert not out.exists() and [left.finished for left in left_of(out)] == [3]
    with pytest.raises(CheckpointError, match=r"seed \(0, now 1\)"):
        compare(passes=SPECS, output=out, resume=True, seed=1, **given)
    with interrupted_after(0) as parts:
        compare(passes=SPECS, output=out, resume=True, **given)
    assert parts == [1] and said(out) == said(tmp_path / "whole") and not hidden(tmp_path)


def test_other_passes_may_come_to_it(tmp_path: Path) -> None:
    deep("llama", 1).save_pretrained(tmp_path / "model")
    given: dict[str, Any] = {"model": tmp_path / "model", "calibration": IDS, "output": tmp_path / "out"}
    with interrupted_after(2), pytest.raises(KeyboardInterrupt):
        compare(passes=SPECS[:2], **given)
    with interrupted_after(0) as parts:
        result = compare(passes=[SPECS[2], SPECS[0]], resume=True, **given)
    assert parts == [1] and [row.name for row in result.rows] == ["dense", SPECS[2], SPECS[0]]


def test_without_an_output_nothing_is_kept(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no output, beside which passes would be kept"):
        compare(tmp_path, SPECS, resume=True)
