"""Scores side by side, for each metric of each task, and what is to be thought of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from sparsify.quality.scores import told
from sparsify.words import plain

if TYPE_CHECKING:
    from sparsify.quality.evaluation import Evaluation
    from sparsify.quality.scores import Score

# The scores of all models by task and metric.
Rows: TypeAlias = "dict[tuple[str, str], list[Score | None]]"

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
    more = " Differences are from the first model, on the same documents." if len(results) > 1 else ""
    table.caption = f"± one standard error.{more}"
    notes = dict.fromkeys(note for _, result in results for note in result.notes)
    parts: list[RenderableType] = [table, *(Text(plain(note), "yellow") for note in notes)]
    for name, result in results[1:]:
        parts += _verdicts(name, results[0][1], result)
    return parts


def _beside(rows: Rows, results: Sequence[tuple[str, Evaluation]]) -> Table:
    """One or two models: a column each."""
    table = _table("task", "metric", "n", *(plain(name) for name, _ in results), *(["difference"] * (len(results) - 1)))
    last = ""
    for (task, metric), scores in rows.items():
        known = next(score for score in scores if score is not None)
        if known.tasks > 1 and task != last:
            table.add_section()
        cells = [_said(score) for score in scores] + [_difference(score, scores[0]) for score in scores[1:]]
        table.add_row("" if task == last else plain(task), plain(metric), str(known.n), *cells)
        last = task
    return table


def _below(rows: Rows, results: Sequence[tuple[str, Evaluation]]) -> Table:
    """More models: a line each."""
    table = _table("task", "metric", "model", "n", "score", "difference")
    for (task, metric), scores in rows.items():
        table.add_section()
        for number, (score, (name, _)) in enumerate(zip(scores, results, strict=True)):
            said = (plain(task), plain(metric)) if not number else ("", "")
            more = _difference(score, scores[0]) if number else ""
            table.add_row(*said, plain(name), "" if score is None else str(score.n), _said(score), more)
    return table


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
    if all(pair.verdict is None for pair in pairs) and result.scores and first.scores:
        lines.append(Text(plain(f"{name}: other documents than the first's, so that no pairs can be compared")))
    return lines
