"""The page of qualities holds what was measured, and nothing else."""

from __future__ import annotations

from pathlib import Path

from bench_quality import bits, kept, listed, specs, tables

PAGE = Path(__file__).parents[2] / "docs" / "quality.md"


def test_the_page_is_of_the_runs_that_are_kept() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.endswith("\n".join(tables(kept())) + "\n"), "put what python tools/bench_quality.py prints at its end"


def test_a_pipeline_is_read_as_passes() -> None:
    assert specs("dense", "") == []
    assert specs("permute+twin+refine", "2:4") == ["permute:2:4", "twin:2:4", "refine"]
    assert specs("twin:blend=1+refine:rate=0.01", "50%") == ["twin:50%,blend=1", "refine:rate=0.01"]


def test_passes_that_round_have_a_grid_of_their_own_and_take_fewer_bits() -> None:
    asked = "twin,round:int4,group=64,twin+refine+round:int8,refine:rate=0.1,epochs=2"
    assert listed(asked) == ["twin", "round:int4,group=64", "twin+refine+round:int8", "refine:rate=0.1,epochs=2"]
    assert specs("twin+round:int4,group=64", "2:4") == ["twin:2:4", "round:int4,group=64"]
    assert specs("round:int8", "") == ["round:int8"]
    found = [
        bits(*each)
        for each in [("dense", ""), ("twin", "2:4"), ("round:int8", ""), ("twin+round:int4,group=64", "50%")]
    ]
    assert found == [16, 9, 8, 3.25]
