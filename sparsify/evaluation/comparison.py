"""The result of comparing passes: rows, a table, a dictionary."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class ComparedPass:
    """One pass of a comparison.

    Attributes:
        perplexity: on the held-out text; None where none was given.
        errors: ‖X₀Wᵀ−XŴᵀ‖/‖X₀Wᵀ‖ of each site over the calibration tokens, in the order of the model: its output in
            the pruned model against that in the dense one, what earlier sites lost included. ``error``: their mean.
            ``kept``: fraction of the pruned sites' weights.
        seconds: tracing, calibration, pruning and writing. ``memory``: peak resident bytes meanwhile, None where
            the system does not say.
    """

    name: str
    perplexity: float | None
    error: float | None
    kept: float
    seconds: float
    memory: int | None
    errors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class Compared:
    """The result of :func:`compare`: the dense model first, then one row per pass.

    Attributes:
        sites: of each site that was measured, by its name, the block that it is in and its kind.
    """

    model: str
    calibration: str
    data: str | None
    schedule: str
    rows: list[ComparedPass]
    output: Path | None = None
    sites: dict[str, tuple[str, str]] = field(default_factory=dict)

    def markdown(self) -> str:
        """The table, as text for a report."""
        lines = ["| pass | perplexity | error | kept | seconds | peak memory, MiB |", "|---|---|---|---|---|---|"]
        for row in self.rows:
            cells = [
                "" if value is None else format(value, form)
                for value, form in (
                    (row.perplexity, ".3f"),
                    (row.error, ".4f"),
                    (row.kept, ".2%"),
                    (row.seconds, ".1f"),
                    (None if row.memory is None else row.memory / (1 << 20), ".0f"),
                )
            ]
            lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"

    def as_dict(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k != "output"}
