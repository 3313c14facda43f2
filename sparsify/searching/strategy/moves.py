"""From one choice of parts to better ones: a few taken in, a few left out, where costs say that it still fits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

# Parts that change in one move.
_CHANGED = 3
# How much of a surprise is taken to be the new parts' own: the rest is what they do together.
_LEARNED = 0.5


@dataclass
class Moves:
    """What is known of the parts while choices of them are tried.

    Attributes:
        sizes: of each part. costs: what each adds to the loss, as far as is known; they learn.
        slack: what the loss may be. losses: of every choice that was tried.
    """

    sizes: Mapping[str, int]
    costs: dict[str, float]
    slack: float
    losses: dict[frozenset[str], float] = field(default_factory=dict)

    def size(self, parts: Iterable[str]) -> int:
        return sum(self.sizes[part] for part in parts)

    def following(self, best: frozenset[str]) -> frozenset[str] | None:
        """The choice to try next: of those with more weights than ``best`` the one with most that is predicted to fit;
        where none is, the one with the least loss for each weight that it has more. None where all were tried.

        What has all parts of a choice that did not fit is taken not to fit either.
        """
        broken = [choice for choice, loss in self.losses.items() if loss > self.slack]
        at_best = self.losses.get(best, 0.0)
        found: tuple[tuple[bool, float], frozenset[str]] | None = None
        for taken, left in self._changes(best):
            more = self.size(taken) - self.size(left)
            if more <= 0:
                continue
            added = sum(self.costs[part] for part in taken) - sum(self.costs[part] for part in left)
            fits = at_best + added <= self.slack
            worth = (fits, float(more) if fits else -(at_best + added - self.slack) / more)
            if found is not None and worth <= found[0]:
                continue
            choice = (best - set(left)) | set(taken)
            if choice not in self.losses and not any(choice >= one for one in broken):
                found = worth, choice
        return None if found is None else found[1]

    def learn(self, best: frozenset[str], choice: frozenset[str], loss: float) -> None:
        """Take down what ``choice``, a move away from ``best``, was measured to lose."""
        self.losses[choice] = loss
        taken, left = choice - best, best - choice
        if not math.isfinite(loss) or not taken:
            return
        costs = self.costs
        said = self.losses.get(best, 0.0) + sum(costs[p] for p in taken) - sum(costs[p] for p in left)
        whole = sum(abs(costs[part]) + 1e-12 for part in taken)
        for part in taken:
            costs[part] += _LEARNED * (loss - said) * (abs(costs[part]) + 1e-12) / whole

    def _changes(self, best: frozenset[str]) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
        inside = [part for part in self.sizes if part in best]
        outside = [part for part in self.sizes if part not in best]
        for count in range(1, _CHANGED + 1):
            for gone in range(_CHANGED + 1 - count):
                for taken in itertools.combinations(outside, count):
                    for left in itertools.combinations(inside, gone):
                        yield taken, left
