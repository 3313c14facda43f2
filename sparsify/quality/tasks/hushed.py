"""Bars and prints of lm-eval's, made phases of our own or left out: results alone go to the standard output."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator
from typing import Any
from unittest.mock import patch

from sparsify.context import Progress, report


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Around what lm-eval does."""
    import datasets
    from lm_eval.api import task

    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        # The one bar of lm-eval's that nothing turns off.
        with patch.object(task, "tqdm", _told), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        if bars:
            datasets.enable_progress_bars()


def _told(items: Iterable[Any], total: int | None = None, **_: Any) -> Iterator[Any]:
    """The documents of a task, as questions are made of them."""
    for number, item in enumerate(items):
        report(Progress("writing questions", number, total))
        yield item
