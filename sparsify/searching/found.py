"""What a search gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsify.compiler.result import Compiled
from sparsify.searching.trials import Trial


@dataclass(frozen=True)
class Found:
    """The sparsest model within a budget of those tried.

    Attributes:
        budget: as text. dense, limit: the dense model's perplexity, and the largest within the budget.
        best: the trial that was written. perplexity: of the model as it was written. trials: every one, in order.
        resumed: how many of them an earlier run had made.
        weights: how many weights could be pruned, of which ``best.sparsity`` are zero.
        data, calibration: in words. sha256: of the token ids that judge.
        compiled: the model, as of :func:`sparsify.compile`. output: its folder, or None.
        kept: the file of the trials, or None.
        recipe: of a compile that prunes so again; None where the model or the data were in memory alone.
    """

    model: str
    budget: str
    dense: float
    limit: float
    best: Trial
    perplexity: float
    trials: Sequence[Trial]
    weights: int
    data: str
    calibration: str | None
    schedule: str
    seconds: float
    sha256: str = ""
    resumed: int = 0
    compiled: Compiled | None = field(default=None, repr=False)
    output: Path | None = None
    kept: Path | None = None
    recipe: Mapping[str, Any] | None = field(default=None, repr=False)

    @property
    def sparsity(self) -> float:
        return self.best.sparsity

    @property
    def shares(self) -> Mapping[str, float]:
        """Of each kind of layer (of each kind in some blocks, where a pattern is given) the share of zeros."""
        return self.best.shares

    @property
    def words(self) -> list[str]:
        """What follows ``sparsify compile MODEL`` for the same pruning."""
        return words_of(self.best)

    def __repr__(self) -> str:
        return (
            f"<{self.sparsity:.2%} zeros of {self.weights:,} weights of {self.model} within {self.budget}: perplexity "
            f"{self.perplexity:.4g}, dense {self.dense:.4g}; {self.best.spec}; {len(self.trials)} trials>"
        )

    def record(self) -> dict[str, Any]:
        """What ``sparsify.json`` says: the same for the same search, without times and places."""
        content = self.as_dict()
        for name in ("seconds", "resumed", "output", "kept"):
            del content[name]
        content["trials"] = [{k: v for k, v in trial.items() if k != "seconds"} for trial in content["trials"]]
        return content

    def as_dict(self) -> dict[str, Any]:
        """All of it but the model, as JSON."""
        return {
            "model": self.model,
            "budget": self.budget,
            "dense_perplexity": self.dense,
            "limit": self.limit,
            "perplexity": self.perplexity,
            "sparsity": self.sparsity,
            "weights": self.weights,
            "shares": dict(self.shares),
            "spec": self.best.spec,
            "ignore": list(self.best.ignore),
            "schedule": self.schedule,
            "data": self.data,
            "sha256": self.sha256,
            "calibration": self.calibration,
            "seconds": round(self.seconds, 3),
            "resumed": self.resumed,
            "output": None if self.output is None else str(self.output),
            "kept": None if self.kept is None else str(self.kept),
            "trials": [trial.as_dict() for trial in self.trials],
        }


def words_of(trial: Trial) -> list[str]:
    """The options of ``sparsify compile`` that prune as ``trial`` did."""
    return ["--pass", trial.spec, *(word for name in trial.ignore for word in ("--ignore", name))]
