"""What ``sparsify eval --json`` says of a folder, for its page: perplexity, tasks, and the model beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sparsify.errors import CheckpointError
from sparsify.files.json_text import parse_json
from sparsify.files.manifest_form import EVALUATED, misfit
from sparsify.files.reading import MAX_CONFIG, admit
from sparsify.provenance.figures import Figure
from sparsify.provenance.markdown import short
from sparsify.quality.scores import Difference, Score, told
from sparsify.reporting.markup import Markup, code, table, tag

_MAKE = "Give what sparsify eval MODEL OUT --tasks TASKS --json printed of this folder"
_OF_A_SCORE = frozenset(f.name for f in fields(Score)) - {"samples", "parts"}


@dataclass(frozen=True)
class Measured:
    """One evaluation of the folder.

    Attributes:
        first: the model that was measured before it, by its name; None where there was none.
        figure: the perplexity of both; None where there was no text, or no other model on the same windows.
        scores: of the folder. firsts: of the other model. pairs: both, on the same documents; verdicts: of those, by
            task and metric. notes: what is to be known of the scores.
    """

    first: str | None
    figure: Figure | None
    scores: Sequence[Score]
    firsts: Mapping[tuple[str, str], Score]
    pairs: Sequence[Difference]
    verdicts: Mapping[tuple[str, str], str]
    notes: Sequence[str]

    def sentences(self) -> list[str]:
        """For the top of the page: each task by the metric that it is judged by; of many the sets alone."""
        return [
            f"{short(pair.score.task)}, {short(pair.score.metric)}, went from {pair.other.said} to {pair.score.said}: "
            f"{self.verdicts[pair.score.key]}."
            for pair in told(self.pairs)
            if pair.score.key in self.verdicts
        ]

    def table(self) -> list[Markup]:
        """Every score; nothing where there are none."""
        if not self.scores:
            return []
        differences = {pair.score.key: pair.said for pair in self.pairs}
        others = [short(self.first)] if self.first is not None else []
        rows = []
        for score in self.scores:
            before = [self.firsts[score.key].said if score.key in self.firsts else "–"] * len(others)
            after = [score.said, *([differences.get(score.key, "–")] * len(others))]
            rows.append((code(short(score.task)), short(score.metric), f"{score.n:,}", *before, *after))
        titles = ("task", "metric", "n", *others, "this model", *(["difference"] * len(others)))
        said = "± one standard error."
        said += " Differences are on the same documents." if others else " No other model was measured beside it."
        notes = [tag("p", note) for note in self.notes]
        return [tag("h3", "Tasks"), table(titles, rows, range(2, len(titles))), tag("p", said), *notes]


def measured(path: Path, digest: str) -> Measured:
    """What the file at ``path`` has of the folder whose ``sparsify.json`` has ``digest``.

    Raises:
        CheckpointError: no such file, not what ``sparsify eval --json`` printed, or nothing of this folder in it.
    """
    asked, rows = f"evaluation {path}", _rows(path)
    row = next((row for row in rows if row.get("manifest") == digest), None)
    if row is None:
        names = ", ".join(short(row.get("model", "no name")) for row in rows) or "nobody"
        found = f"of {names}: none is this folder as it is now (each is known by the digest of its sparsify.json)"
        raise CheckpointError(asked, found=found, do=f"{_MAKE}, without --no-check")
    first = rows[0] if row is not rows[0] else None
    scores = [_score(own) for own in row.get("scores", ())]
    firsts = {score.key: score for score in map(_score, [] if first is None else first.get("scores", ()))}
    own, pairs, verdicts = {score.key: score for score in scores}, [], {}
    for pair in row.get("scores_against_the_first", ()):
        key = (pair["task"], pair["metric"])
        if key in own and key in firsts:
            told_of = pair["difference"], pair.get("standard_error"), pair["changed"]
            pairs.append(Difference(own[key], firsts[key], *told_of))
            if pair.get("verdict"):
                verdicts[key] = pair["verdict"]
    name = None if first is None else str(first.get("model", "another model"))
    return Measured(name, _figure(row, first, name), scores, firsts, pairs, verdicts, row.get("notes", ()))


def _rows(path: Path) -> list[Mapping[str, Any]]:
    asked = f"evaluation {path}"
    try:
        if (size := admit(path).stat().st_size) > MAX_CONFIG:
            raise CheckpointError(asked, found=f"{size} bytes, more than {MAX_CONFIG}", do=_MAKE)
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(asked, found=f"no JSON that can be read ({error})", do=_MAKE) from error
    # Of one model it is printed alone.
    rows = content if isinstance(content, list) else [content]
    if (found := misfit(rows, [EVALUATED])) is not None:
        raise CheckpointError(asked, found=found, do=_MAKE)
    if not any({"perplexity", "scores"} & row.keys() for row in rows):
        raise CheckpointError(asked, found="neither perplexities nor scores in it", do=_MAKE)
    return rows


def _score(said: Mapping[str, Any]) -> Score:
    given = {key: value for key, value in said.items() if key in _OF_A_SCORE}
    value = said.get("value")
    return Score(**{"standard_error": None, **given, "value": math.nan if value is None else float(value)})


def _figure(row: Mapping[str, Any], first: Mapping[str, Any] | None, name: str | None) -> Figure | None:
    before, after = (None if own is None else own.get("perplexity") for own in (first, row))
    if first is None or before is None or not row.get("sha256") or row["sha256"] != first.get("sha256"):
        return None
    size = f"{row.get('windows')} windows of {row.get('sequence_length')} tokens of {row.get('data')}"
    paired = row.get("against_the_first", {})
    return Figure(
        f"measured by sparsify eval, before is {name}",
        size,
        before if math.isfinite(before) else None,
        after if after is not None and math.isfinite(after) else None,
        str(paired.get("verdict", "")),
        paired.get("standard_error"),
        row["sha256"],
    )
