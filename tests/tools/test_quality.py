"""The page of qualities holds what was measured, and nothing else."""

from __future__ import annotations

from pathlib import Path

from bench_quality import kept, specs, tables

PAGE = Path(__file__).parents[2] / "docs" / "quality.md"


def test_the_page_is_of_the_runs_that_are_kept() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.endswith("\n".join(tables(kept())) + "\n"), "put what python tools/bench_quality.py prints at its end"


def test_a_pipeline_is_read_as_passes() -> None:
    assert specs("dense", "") == []
    assert specs("permute+twin+refine", "2:4") == ["permute:2:4", "twin:2:4", "refine"]
    assert specs("twin:blend=1+refine:rate=0.01", "50%") == ["twin:50%,blend=1", "refine:rate=0.01"]
