"""What a manifest says was measured of its model: perplexity before and after a step, on what, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sparsify.provenance.runs import earlier


@dataclass(frozen=True)
class Figure:
    """One perplexity before and after.

    Attributes:
        what: made the difference. data: what it was measured on. before, after: None where it was no number.
        verdict: in words; empty where nobody judged. windows: the digest of the token ids; empty where nobody said.
        step: of the history; None where it is of the whole folder.
    """

    what: str
    data: str
    before: float | None
    after: float | None
    verdict: str = ""
    standard_error: float | None = None
    windows: str = ""
    step: int | None = None

    @property
    def ratio(self) -> float | None:
        """After over before: less is better."""
        if self.before is None or self.after is None or self.before <= 0:
            return None
        return self.after / self.before

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "ratio": self.ratio}


def figures_of(manifest: Mapping[str, Any]) -> list[Figure]:
    """Every perplexity that ``manifest`` knows, the oldest first."""
    found = []
    for number, run in enumerate(earlier(manifest), 1):
        if "perplexity" in run:
            before, after = map(_number, run["perplexity"])
            what = f"{run['command']}, step {number}"
            found.append(Figure(what, str(run.get("validation", "")), before, after, step=number))
    if {"dense_perplexity", "perplexity", "data"} <= (search := manifest.get("search", {})).keys():
        before, after = _number(search["dense_perplexity"]), _number(search["perplexity"])
        windows = str(search.get("sha256", ""))
        found.append(Figure("measured by the search that made it", search["data"], before, after, windows=windows))
    if (judged := manifest.get("evaluation")) is not None:
        size = f"{judged.get('windows')} windows of {judged.get('sequence_length')} tokens of {judged.get('data')}"
        said = str(judged.get("verdict", "")), _number(judged.get("standard_error")), str(judged.get("sha256", ""))
        found.append(
            Figure(
                "measured when it was written", size, _number(judged.get("dense")), _number(judged.get("pruned")), *said
            )
        )
    return found


def _number(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
