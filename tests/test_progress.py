"""The progress line: drawn from what observers are told, on a terminal only."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from sparsify.context import Progress
from sparsify.progress import ProgressLine


def drawn(*steps: Progress, terminal: bool = True, enabled: bool = True) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=160, color_system=None)
    with ProgressLine(console, enabled) as line:
        for step in steps:
            line.show(step)
        line._progress.refresh()
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()


def test_regions_label_rate_and_memory() -> None:
    said = drawn(Progress(0, 4, "model.layers.0", 512), Progress(1, 4, "model.layers.1", 512))
    assert "1/4" in said and "model.layers.1" in said and "tokens/s" in said and ("MiB" in said or "GiB" in said)
    assert "tokens/s" not in drawn(Progress(1, 2, "evaluating", 0)), "no rate where no tokens are counted"


@pytest.mark.parametrize(("terminal", "enabled"), [(False, True), (True, False)])
def test_nothing_is_drawn_into_a_file_or_where_it_is_quiet(terminal: bool, enabled: bool) -> None:
    assert drawn(Progress(1, 2, "model.layers.0", 9), terminal=terminal, enabled=enabled).strip() == ""
