"""What ``sparsify diff`` prints: a verdict, tables of 80 columns, and lists that are cut where JSON has all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from sparsify.comparing.difference import Change, Difference, Group
from sparsify.provenance.figures import Figure
from sparsify.words import plain

# Names, keys and characters of a value that are told.
_NAMES, _CHANGES, _VALUE = 3, 12, 28
_HEAD = ("zeros A", "zeros B", "shared", "overlap", "moved")


def difference_report(found: Difference) -> RenderableType:
    """All of it, for a terminal."""
    parts: list[RenderableType] = [
        *map(Text, (plain(f"A  {found.a}"), plain(f"B  {found.b}"))),
        Text(found.verdict, "bold"),
    ]
    whole = found.whole
    if whole.same == whole.tensors:
        parts.append(Text(f"{whole.zeros_a:,} of {whole.numbers_a:,} numbers are zero ({_percent(whole.share_a)})"))
    else:
        parts += [_table("by kind", found.kinds, whole), _table("by block", found.blocks)]
        lines = "shared: of A's zeros the share that is zero in B. overlap: weights that both keep, of"
        parts.append(Text(f"{lines} those that either keeps. moved: ‖B−A‖/‖A‖ over what both keep."))
    parts += map(Text, _lists(found))
    for title, own in (("config.json", found.config), ("last step", found.recipe)):
        parts += [_changes(title, own)] if own else []
    return Lines(*parts, *_history(found), *_figures(found))


def _table(title: str, groups: Sequence[Group], whole: Group | None = None) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("", overflow="fold")
    if silent := sum(group.plain for group in groups):
        table.caption = f"and {silent} more, the same in both and without zeros"
    for name in _HEAD:
        table.add_column(name, justify="right", no_wrap=True)
    for group in groups:
        if group.plain:
            continue
        table.add_row(f"{group.name} ×{group.tensors}" if whole is not None else group.name, *_row(group))
    if whole is not None:
        table.add_section()
        table.add_row(whole.name, *_row(whole))
    return table


def _row(group: Group) -> tuple[str, ...]:
    own = group.overlap
    moved = "–" if own.relative_move is None else f"{own.relative_move:.4f}"
    return (
        _percent(group.share_a),
        _percent(group.share_b),
        _percent(own.zeros_shared),
        _percent(own.kept_jaccard),
        moved,
    )


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.2%}"


def _lists(found: Difference) -> list[str]:
    shapes = [f"{t.name} ({_shape(t.shape_a)}, {_shape(t.shape_b)})" for t in found.reshaped]
    dtypes = [
        f"{t.name} ({t.dtype_a}, {t.dtype_b})"
        for t in found.tensors
        if t.dtype_a and t.dtype_b and t.dtype_a != t.dtype_b
    ]
    lists = (
        ("dense in A, not in B", found.dense_in_a),
        ("dense in B, not in A", found.dense_in_b),
        ("tensors only in A", found.only_a),
        ("tensors only in B", found.only_b),
        ("shapes differ, so that numbers are not compared", shapes),
        ("dtypes differ", dtypes),
        ("files only in A", found.files_a),
        ("files only in B", found.files_b),
    )
    return [f"{title}: {_some(names)}" for title, names in lists if names]


def _shape(shape: tuple[int, ...] | None) -> str:
    return "×".join(map(str, shape or ()))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES:,} more" if len(names) > _NAMES else ""
    return plain(", ".join(names[:_NAMES])) + more


def _changes(title: str, changes: Sequence[Change]) -> Table:
    table = Table(title=f"{title} differs", title_justify="left", caption_justify="left")
    for name in ("", "A", "B"):
        table.add_column(name, overflow="fold")
    for change in changes[:_CHANGES]:
        table.add_row(change.what, _value(change.a), _value(change.b))
    if len(changes) > _CHANGES:
        table.caption = f"and {len(changes) - _CHANGES} more; --json has all"
    return table


def _value(value: Any) -> str:
    if value is None:
        return "–"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _VALUE else f"{text[: _VALUE - 1]}…"


def _history(found: Difference) -> list[RenderableType]:
    many = "first step is" if found.shared_steps == 1 else f"first {found.shared_steps} steps are"
    lines = [f"history: the {many} the same"] if found.shared_steps else []
    for name, steps in (("A", found.steps_a), ("B", found.steps_b)):
        lines += [f"history of {name} alone: {_step(step)}" for step in steps]
    return list(map(Text, lines))


def _step(step: Mapping[str, Any]) -> str:
    specs = " + ".join(str(own.get("spec")) for own in step.get("passes", ()))
    of = step.get("source", {}).get("name")
    said = [str(step.get("command")), specs, f"of {of}" if of else "", str(step.get("date", ""))]
    return plain(" ".join(filter(None, said)))


def _figures(found: Difference) -> list[RenderableType]:
    """Perplexities side by side; on other windows they say nothing of each other."""
    if not (found.figures_a or found.figures_b):
        return []
    table = Table(title="perplexity, as the folders say", title_justify="left", caption_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("on", overflow="fold")
    for name in ("before", "after", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, figures in (("A", found.figures_a), ("B", found.figures_b)):
        for figure in figures:
            table.add_row(name, figure.data, *(_number(v) for v in (figure.before, figure.after, figure.ratio)))
    windows = {_windows(figure) for figures in (found.figures_a, found.figures_b) for figure in figures[-1:]}
    if found.figures_a and found.figures_b and len(windows) > 1:
        table.caption = "On other text: the two do not compare."
    return [table]


def _windows(figure: Figure) -> str:
    return figure.windows or figure.data


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.3f}"
