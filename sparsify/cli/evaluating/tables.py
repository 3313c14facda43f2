"""Scores side by side, for each metric of each task, and what is to be thought of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from sparsify.quality.scores import told
from sparsify.words import LONG_NAME, apart, plain

if TYPE_CHECKING:
    from sparsify.quality.evaluation import Evaluation
    from sparsify.quality.scores import Score

# The scores of all models by task and metric.
Rows: TypeAlias = "dict[tuple[str, str], list[Score | None]]"

# So much of a name that is folded stands on a line at least.
_NAME = 6

# Verdicts that ask for something are seen at once.
_STYLES = {"clearly": "yellow", "much": "bold red", "far": "bold red"}


def score_report(results: Sequence[tuple[str, Evaluation]]) -> list[RenderableType]:
    """Every score of every model, and verdicts on the second and every later one; nothing where there are none."""
    rows: Rows = {}
    for number, (_, result) in enumerate(results):
        for score in result.scores:
            rows.setdefault(score.key, [None] * len(results))[number] = score
    if not rows:
        return []
    table = _beside(rows, results) if len(results) < 3 else _below(rows, results)
    units = " and ".join(dict.fromkeys(f"{score.unit}s" for _, result in results for score in result.scores))
    more = f" Differences are from the first model, on the same {units}." if len(results) > 1 else ""
    table.table.caption = f"± one standard error.{more}"
    notes = dict.fromkeys(note for _, result in results for note in result.notes)
    parts: list[RenderableType] = [table, *(Text(plain(note), "yellow") for note in notes)]
    for name, result in results[1:]:
        parts += _verdicts(name, results[0][1], result)
    return parts


def _beside(rows: Rows, results: Sequence[tuple[str, Evaluation]]) -> _Unbroken:
    """One or two models: a column each."""
    named = [plain(name) for name in apart([name for name, _ in results])]
    table = _table("task", "metric", "n", *named, *(["difference"] * (len(results) - 1)))
    last = ""
    for (task, metric), scores in rows.items():
        known = next(score for score in scores if score is not None)
        if known.tasks > 1 and task != last:
            table.add_section()
        cells = [_said(score) for score in scores] + [_difference(score, scores[0]) for score in scores[1:]]
        table.add_row("" if task == last else plain(task), plain(metric), str(known.n), *cells)
        last = task
    return _Unbroken(table)


def _below(rows: Rows, results: Sequence[tuple[str, Evaluation]]) -> _Unbroken:
    """More models: a line each."""
    table = _table("task", "metric", "model", "n", "score", "difference")
    named = apart([name for name, _ in results])
    for (task, metric), scores in rows.items():
        table.add_section()
        for number, (score, name) in enumerate(zip(scores, named, strict=True)):
            said = (plain(task), plain(metric)) if not number else ("", "")
            more = _difference(score, scores[0]) if number else ""
            table.add_row(*said, plain(name), "" if score is None else str(score.n), _said(score), more)
    return _Unbroken(table)


class _Unbroken:
    """``table``, whose figures stay on one line where the terminal has room for that; names are folded then."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = self.table.columns
        figures = [column for column in columns if column.justify == "right"]
        widths = [max([min(len(str(c.header)), LONG_NAME), *map(len, map(str, c.cells))]) for c in figures]
        # Of a name at least so many letters stand on one line; a column has two spaces and a rule.
        if sum(widths) + _NAME * (len(columns) - len(figures)) + 3 * len(columns) + 1 <= options.max_width:
            for column, width in zip(figures, widths, strict=True):
                column.width = width
        yield self.table


def _table(*columns: str) -> Table:
    table = Table(title="scores", title_justify="left", caption_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in ("task", "metric", "model") else "right", overflow="fold")
    return table


def _said(score: Score | None) -> str:
    return "–" if score is None else score.said


def _difference(score: Score | None, first: Score | None) -> str:
    pair = None if first is None or score is None else score.against(first)
    return "–" if pair is None else pair.said


def _verdicts(name: str, first: Evaluation, result: Evaluation) -> list[RenderableType]:
    """A line for each task by the metric that it is judged by; where there are many, for sets and groups alone."""
    pairs = result.differences(first)
    lines: list[RenderableType] = []
    for pair in told(pairs):
        said = f"{name}: {pair.score.task}, {pair.score.metric}: {pair.verdict}"
        lines.append(Text(plain(said), _STYLES.get(pair.level or "", "")))
    if not pairs and result.scores and first.scores:
        known = {score.key: score for score in first.scores}
        same = any(score.key in known and known[score.key].sha256 == score.sha256 for score in result.scores)
        why = "scores that are no means over documents" if same else "other documents than the first's"
        lines.append(Text(plain(f"{name}: {why}, so that no pairs can be compared")))
    return lines
