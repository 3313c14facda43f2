"""What ``sparsify.json`` promises of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsify.method.pattern import Pattern, parse_pattern


@dataclass(frozen=True)
class Promise:
    """What ``sparsify.json`` says of one tensor."""

    pattern: Pattern
    kept: float


def promises(manifest: Mapping[str, Any]) -> dict[str, Promise]:
    """What the manifest says each checkpoint tensor holds, by the last pass that pruned it."""
    promised = {}
    for run in manifest.get("passes", []):
        for site in run["sites"]:
            for tensor in site["tensors"]:
                # A site of several tensors (experts) has one kept share for all: each may differ.
                kept = site["kept"] if len(site["tensors"]) == 1 else 1.0
                promised[tensor] = Promise(parse_pattern(site["pattern"]), kept)
    return promised
