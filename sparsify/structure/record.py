"""What a structural pass did: for the user, for the manifest, and to be replayed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from sparsify.errors import Refused
from sparsify.method.spec import spec_text
from sparsify.method.structural_pass import StructuralPass


@dataclass(frozen=True)
class Cut:
    """What was taken out of one group.

    Attributes:
        kind: heads, channels, experts or width. name: where it is. before, after: how many there are.
        removed: their numbers. members: (parameter, axis, positions that stay), the replayable edit.
    """

    kind: str
    name: str
    before: int
    after: int
    removed: tuple[int, ...]
    members: tuple[tuple[str, int, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Restructured:
    """One structural pass, done (or planned: ``removed`` is empty then)."""

    structural_pass: StructuralPass
    cuts: list[Cut]
    skipped: list[Refused]
    config: dict[str, Any]
    parameters: tuple[int, int]

    @property
    def ragged(self) -> bool:
        return self.structural_pass.ragged

    def lines(self) -> list[str]:
        """For a terminal."""
        kinds: dict[tuple[str, int, int], int] = {}
        for cut in self.cuts:
            key = (cut.kind, cut.before, cut.after)
            kinds[key] = kinds.get(key, 0) + 1
        parts = [f"{kind} {before} → {after} (×{count})" for (kind, before, after), count in kinds.items()]
        before, after = self.parameters
        shrunk = f"; parameters {before:,} → {after:,} ({after / before:.3f}×)" if after else ""
        reasons: dict[str, int] = {}
        for skipped in self.skipped:
            # Which of many alike is no news in a summary: "linear_12 sums over …".
            reason = re.sub(r"^([a-z_]+)_\d+ ", r"\1 ", skipped.reason)
            reasons[reason] = reasons.get(reason, 0) + 1
        kept = [f"not as asked: {count} × {reason}" for reason, count in reasons.items()]
        if self.ragged:
            kept.append(
                "layers may differ in width: sparsify.load(OUT) and sparsify's commands read the folder, "
                "transformers and other loaders refuse it"
            )
        return [f"{', '.join(parts)}{shrunk}", *kept]

    def as_dict(self) -> dict[str, Any]:
        return {
            "spec": spec_text(self.structural_pass),
            "config": self.config,
            "ragged": self.ragged,
            "parameters": list(self.parameters),
            "cuts": [
                {
                    "kind": c.kind,
                    "name": c.name,
                    "before": c.before,
                    "after": c.after,
                    "removed": list(c.removed),
                    "members": [[name, axis, list(kept)] for name, axis, kept in c.members],
                }
                for c in self.cuts
            ],
        }
