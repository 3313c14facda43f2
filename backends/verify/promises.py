"""What ``sparsify.json`` promises of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsify.errors import CheckpointError, PatternError
from sparsify.files.manifest import MANIFEST
from sparsify.method.pattern import Pattern, parse_pattern


@dataclass(frozen=True)
class Promise:
    """What ``sparsify.json`` says of one tensor."""

    pattern: Pattern
    kept: float


def promises(manifest: Mapping[str, Any]) -> dict[str, Promise]:
    """What the manifest says each checkpoint tensor holds, by the last pass that pruned it.

    Raises:
        CheckpointError: passes of another form than ours have.
    """
    promised = {}
    try:
        for run in manifest.get("passes", []):
            for site in run["sites"]:
                for tensor in site["tensors"]:
                    # A site of several tensors (experts) has one kept share for all: each may differ.
                    kept = float(site["kept"]) if len(site["tensors"]) == 1 else 1.0
                    promised[str(tensor)] = Promise(parse_pattern(site["pattern"]), kept)
    except (KeyError, TypeError, ValueError, AttributeError, PatternError) as error:
        raise CheckpointError(
            f"passes in {MANIFEST}", found=f"entries that cannot be read ({error!r})", do="Compile again"
        ) from error
    return promised
