"""What pruning each layer costs: rows, totals, the worst of them, and what leaving those dense saves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sparsify.searching.strategy.separable import cheapest_first

Measure = Literal["perplexity", "kl"]
MEANING = {
    "perplexity": "growth of the mean loss (nats a token): ln of the perplexity against the dense model's",
    "kl": "KL divergence of the predictions from the dense model's (nats a token)",
}


@dataclass(frozen=True)
class Cost:
    """What it costs to prune one kind of layer in one block, and nothing else.

    Attributes:
        loss: in nats a token; see :data:`MEANING`. perplexity: None where that was not measured. weights: how many.
    """

    kind: str
    block: str
    sites: tuple[str, ...]
    weights: int
    loss: float
    perplexity: float | None = None


@dataclass(frozen=True)
class Saving:
    """What leaving the worst dense is worth.

    Attributes:
        ignore: patterns of --ignore. share: their part of the whole loss. weights: how many stay dense.
        before, after: the perplexity with everything pruned, and with these left dense.
    """

    ignore: tuple[str, ...]
    share: float
    weights: int
    before: float
    after: float


@dataclass(frozen=True)
class Sensitivity:
    """The result of :func:`sensitivity`.

    Attributes:
        costs: in the order of the model, kind after kind. dense: the dense model's perplexity. data, calibration: in
            words. weights: all that the pass prunes. output: the folder that was written, or None.
    """

    model: str
    spec: str
    measure: Measure
    costs: Sequence[Cost]
    saving: Saving
    dense: float
    data: str
    calibration: str | None
    weights: int
    seconds: float
    output: Path | None = field(default=None)

    @property
    def ranked(self) -> list[Cost]:
        """The dearest first."""
        return sorted(self.costs, key=lambda cost: -cost.loss)

    @property
    def kinds(self) -> dict[str, float]:
        """The sum of what each kind costs in all blocks, the dearest first."""
        return self._sums(lambda cost: cost.kind)

    @property
    def blocks(self) -> dict[str, float]:
        """The sum of what all kinds cost in each block, in the order of the model."""
        sums = self._sums(lambda cost: cost.block)
        return {block: sums[block] for block in dict.fromkeys(cost.block for cost in self.costs)}

    @property
    def total(self) -> float:
        return sum(cost.loss for cost in self.costs)

    @property
    def ignore_line(self) -> str:
        """What to add to ``sparsify compile``."""
        return " ".join(f"--ignore '{name}'" if set(name) & set("*?[") else f"--ignore {name}" for name in self.words)

    @property
    def words(self) -> tuple[str, ...]:
        return self.saving.ignore

    def _sums(self, key: Callable[[Cost], str]) -> dict[str, float]:
        sums: dict[str, float] = {}
        for cost in self.costs:
            sums[key(cost)] = sums.get(key(cost), 0.0) + cost.loss
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def __repr__(self) -> str:
        worst = self.ranked[0]
        kind, loss = next(iter(self.kinds.items()))
        return (
            f"<sensitivity of {self.model} to {self.spec}, {self.measure}: {len(self.costs)} parts; worst "
            f"{worst.kind} of {worst.block} ({worst.loss:.4g} nats a token); of the kinds {kind} ({loss:.4g} of "
            f"{self.total:.4g}); {self.ignore_line}>"
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "spec": self.spec,
            "measure": self.measure,
            "meaning": MEANING[self.measure],
            "dense_perplexity": self.dense,
            "data": self.data,
            "calibration": self.calibration,
            "weights": self.weights,
            "seconds": round(self.seconds, 3),
            "kinds": self.kinds,
            "blocks": self.blocks,
            "ranked": [{**vars(cost), "sites": list(cost.sites)} for cost in self.ranked],
            "saving": {**vars(self.saving), "ignore": list(self.saving.ignore)},
        }

    def markdown(self) -> str:
        """The table, as text for a report."""
        lines = ["| kind | block | loss, nats a token | perplexity | weights |", "|---|---|---|---|---|"]
        for cost in self.ranked:
            perplexity = "" if cost.perplexity is None else f"{cost.perplexity:.3f}"
            lines.append(f"| {cost.kind} | {cost.block} | {cost.loss:.5f} | {perplexity} | {cost.weights} |")
        return "\n".join(lines) + "\n"


def worst(sizes: Sequence[int], losses: Sequence[float], share: float) -> list[int]:
    """Indices of parts, of these sizes, that cost at least ``share`` of the whole loss: those that cost most for each
    weight, so that few weights do."""
    costs = [max(0.0, loss) for loss in losses]
    wanted, found, spent = share * sum(costs), list[int](), 0.0
    for at in reversed(cheapest_first(costs, sizes)):
        if spent >= wanted or not costs[at]:
            break
        found.append(at)
        spent += costs[at]
    return sorted(found)
