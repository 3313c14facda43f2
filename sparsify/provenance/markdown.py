"""Markdown of names that nobody vouches for: they are shown, and make no link, no markup and no further cell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from sparsify.words import plain

# Longer names are cut: a card is read by people.
_MOST = 200


def short(text: Any) -> str:
    """On one line, control characters escaped, and not endless."""
    said = plain(str(text))
    return said if len(said) <= _MOST else f"{said[: _MOST - 1]}…"


def code(text: Any, cell: bool = False) -> str:
    """``text`` as a code span, within which nothing is markup; ``cell``: in a table, where a bar would end it."""
    said = short(text)
    if not said.strip():
        return "`(no name)`"
    fence = "`" * (_longest(said) + 1)
    # A backtick at an end needs a space; with spaces at both ends one of each is dropped.
    room = " " if said[0] in "` " or said[-1] in "` " else ""
    return f"{fence}{room}{said.replace('|', chr(92) + '|') if cell else said}{room}{fence}"


def block(lines: Iterable[str], language: str) -> str:
    """Lines of code."""
    text = "\n".join(plain(line) for line in lines)
    fence = "`" * max(3, _longest(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _longest(text: str) -> int:
    """Of the runs of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)
