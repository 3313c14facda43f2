"""The progress line of a compile: regions done, current site, tokens per second, time left, memory."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sparsify.host import peak_memory
from sparsify.words import format_bytes

if TYPE_CHECKING:
    from sparsify.context import Progress as Step


class ProgressLine:
    """Observes a compile and draws it, on a terminal only."""

    def __init__(self, console: Console, enabled: bool) -> None:
        self._progress = Progress(
            BarColumn(24),
            MofNCompleteColumn(),
            TextColumn("{task.description}", markup=False),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[memory]}"),
            console=console,
            transient=True,
            disable=not (enabled and console.is_terminal),
        )
        self._task = self._progress.add_task("tracing", total=None, rate="", memory="")
        self._started: float | None = None
        self._tokens = 0

    def show(self, step: Step) -> None:
        """Draw what an observer of a compile or an evaluation is told."""
        self._started = self._started or time.perf_counter()
        self._tokens += step.tokens
        # Each token passes every region: a share of the regions is that share of the tokens.
        rate = self._tokens / max(1, step.regions) / max(1e-9, time.perf_counter() - self._started)
        self._show(step.regions_done, step.regions, step.label, f"{rate:,.0f} tokens/s" if self._tokens else "")

    def _show(self, done: int, total: int, what: str, rate: str) -> None:
        self._progress.update(
            self._task, completed=done, total=total, description=what, rate=rate, memory=format_bytes(peak_memory())
        )

    def __enter__(self) -> ProgressLine:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
