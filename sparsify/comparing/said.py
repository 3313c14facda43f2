"""What two folders say of themselves, as keys and values that can be held against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsify.comparing.difference import Change

# Of the manifest, what says how the last step was done.
_SAID = ("calibration", "schedule", "compute_dtype", "allow_nan", "versions")
_OF_A_PASS = ("spec", "options", "schedule", "only", "ignore")


def changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Change]:
    """Every key, dotted, that is not the same in two tables; what one alone has is said whole, and what is not there is
    null."""
    found = []
    for key in dict.fromkeys([*a, *b]):
        one, other = a.get(key), b.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += [Change(f"{key}.{inner.what}", inner.a, inner.b) for inner in changes(one, other)]
        elif one != other:
            found.append(Change(str(key), one, other))
    return found


def last_step(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The passes with their options, and the data, of the last step that pruned."""
    said = {key: manifest[key] for key in _SAID if manifest.get(key) is not None}
    for number, own in enumerate(manifest.get("passes", ()), 1):
        said[f"pass {number}"] = {key: own[key] for key in _OF_A_PASS if key in own}
    for number, own in enumerate(manifest.get("structure", ()), 1):
        said[f"structural pass {number}"] = own.get("spec")
    return said


def shared(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> int:
    """How many steps of two histories are the same, from the first on."""
    pairs = list(zip(a, b, strict=False))
    return next((at for at, (one, other) in enumerate(pairs) if one != other), len(pairs))
