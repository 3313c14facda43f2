"""rich's console as a place that only we format; for commands that print tables, when they do."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from sparsify.words import plain


class Terminal(Console):
    """rich's console without markup, emoji codes and other people's control characters."""

    def __init__(self, *, stderr: bool = False, quiet: bool = False, soft_wrap: bool = False) -> None:
        super().__init__(stderr=stderr, quiet=quiet, soft_wrap=soft_wrap, markup=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            # Control segments are rich's own: where a progress line goes.
            yield Segment(text if control else plain(text, keep="\n"), style, control)
