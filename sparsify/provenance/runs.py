"""The runs that a manifest tells of, whichever version wrote it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any


def earlier(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The history of a folder by its manifest; of one that was written before there was any, what else it says."""
    if "history" in manifest:
        return [dict(run) for run in manifest["history"]]
    known = {"source": {"name": str(manifest.get("model", ""))}, "versions": manifest.get("versions")}
    ran = [own for part in ("structure", "passes") for own in manifest.get(part, ())]
    made = []
    if passes := [{"spec": own["spec"]} for own in ran if "spec" in own]:
        others = {key: manifest.get(key) for key in ("calibration", "recipe")}
        made.append({"command": "compile", "passes": passes, **known, **others})
    if isinstance(tuned := manifest.get("tuned"), Mapping):
        made.append({"command": "tune", "passes": [], **known, **of_tuning(tuned)})
    return [{key: value for key, value in run.items() if value is not None} for run in made]


def held_pattern(own: Mapping[str, Any]) -> str | None:
    """The N:M of a pass of a history, which later passes keep; None of any other."""
    found = re.match(r"[\w-]+:(\d{1,4}:\d{1,4})(?:,|$)", str(own.get("spec")))
    return found[1] if found and "pruned" in own else None


def whole_of(history: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """How many numbers the model has and which share is not zero, as the last run that says so found it."""
    return next((run["whole"] for run in reversed(history) if "whole" in run), None)


def of_tuning(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a history keeps of the record of a tune: all but how long it took and the loss of each step."""
    said = {key: record[key] for key in ("data", "validation", "perplexity", "steps", "tokens") if key in record}
    if isinstance(recipe := record.get("recipe"), Mapping):
        said["training"] = dict(recipe)
    if isinstance(teacher := record.get("teacher"), Mapping):
        said["teacher"] = dict(teacher)
    return said
