"""HTML in which whatever is no markup of ours is text: names in a manifest are anybody's."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from sparsify.words import plain

# Longer texts are cut: a page is read by people.
_MOST = 4000
# Elements that hold nothing and have no end.
_EMPTY = frozenset({"meta", "br"})


class Markup(str):
    """Text that is HTML. Only :func:`tag` and :func:`joined` make it."""


def text(value: object) -> Markup:
    """``value`` as text: escaped, control characters shown, not endless."""
    said = plain(str(value), keep="\n")
    return Markup(html.escape(said if len(said) <= _MOST else f"{said[: _MOST - 1]}…"))


def tag(name: str, /, *inside: object, **attributes: object) -> Markup:
    """An element: ``tag("p", "1 < 2", class_="note")``. What is inside and is no Markup is text; None is left out."""
    own = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None)
    start = "".join(f' {key}="{text(value)}"' for key, value in own)
    return Markup(f"<{name}{start}>") if name in _EMPTY else Markup(f"<{name}{start}>{joined(inside)}</{name}>")


def joined(parts: Iterable[object]) -> Markup:
    """One after the other."""
    return Markup("".join(part if isinstance(part, Markup) else text(part) for part in parts if part is not None))


def code(value: object) -> Markup:
    """A name, or words of a command."""
    return tag("code", value)


def table(head: Sequence[object], rows: Iterable[Sequence[object]], numbers: Iterable[int] = ()) -> Markup:
    """A table that scrolls by itself where a screen is narrow.

    Args:
        numbers: the columns that hold figures, which stand at the right.
    """
    right = frozenset(numbers)

    def cells(kind: str, row: Sequence[object]) -> Markup:
        return joined(tag(kind, cell, class_="n" if at in right else None) for at, cell in enumerate(row))

    titles = (tag("th", cell, scope="col", class_="n" if at in right else None) for at, cell in enumerate(head))
    top = tag("tr", *titles)
    body = joined(tag("tr", cells("td", row)) for row in rows)
    return tag("div", tag("table", tag("thead", top), tag("tbody", body)), class_="scroll", tabindex="0")


def section(title: str, *inside: object) -> Markup:
    """A part of the page with a title; nothing where nothing is inside."""
    parts = [part for part in inside if part]
    return tag("section", tag("h2", title), *parts) if parts else Markup("")
