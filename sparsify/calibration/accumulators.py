"""What is recorded about the input of a linear site, in float32 per batch and float64 across batches.

A pass names the statistics that it wants; the engine feeds each batch's rows and hands the results over. All rows
are [tokens, in_features], padding already taken out. For a stack of experts every statistic is kept per expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from sparsify.world.world import ALONE, World

# Rows of a batch that a statistic takes at once on a CPU.
_ROWS = 256


class Accumulator(Protocol):
    """A statistic under construction for [experts] inputs of one width, of the rows that this process sees."""

    def __init__(self, experts: int, features: int, device: torch.device, world: World = ALONE) -> None: ...

    def update(self, expert: int, rows: Tensor, dense: Tensor) -> None: ...

    def join(self) -> None:
        """Bring together what all processes saw; once, before any value is asked for."""
        ...

    def value(self, expert: int, sequences: int) -> Tensor: ...


class _Vector:
    """One float64 number per input feature, summed over tokens.

    What each batch adds is float32. Several processes keep these vectors apart and add them in the order of the
    batches, so that the sum is, to the bit, that of one process.
    """

    def __init__(self, experts: int, features: int, device: torch.device, world: World = ALONE) -> None:
        # float64 adds nothing to the cost of one vector per batch; the MPS device has none.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.total = torch.zeros(experts, features, dtype=dtype, device=device)
        self.world = world
        self._parts: list[tuple[int, Tensor]] = []

    def update(self, expert: int, rows: Tensor, dense: Tensor) -> None:
        # A few rows at a time, for what is made on the way to stay in a core's cache: fresh memory costs more than
        # sums do.
        added, *others = (self.of(part.float()) for part in rows.split(_ROWS if rows.is_cpu else len(rows)))
        for part in others:
            added += part
        if self.world.divided:
            self._parts.append((expert, added))
        else:
            self.total[expert] += added

    def join(self) -> None:
        experts = torch.tensor([expert for expert, _ in self._parts], dtype=torch.int64)
        none = torch.empty(0, self.total.shape[1], dtype=torch.float32, device=self.total.device)
        parts = torch.stack([added for _, added in self._parts]) if self._parts else none
        self._parts.clear()
        for owners, found in zip(self.world.gathered(experts), self.world.gathered(parts), strict=True):
            for expert, added in zip(owners.tolist(), found, strict=True):
                self.total[expert] += added

    def of(self, rows: Tensor) -> Tensor:
        raise NotImplementedError

    def value(self, expert: int, sequences: int) -> Tensor:
        return self.total[expert] / sequences


class SquaredNorm(_Vector):
    """Sum of squares of each input feature."""

    def of(self, rows: Tensor) -> Tensor:
        return rows.square().sum(dim=0)


class AbsoluteSum(_Vector):
    """Sum of absolute values of each input feature."""

    def of(self, rows: Tensor) -> Tensor:
        return rows.abs().sum(dim=0)


class Sum(_Vector):
    """Sum of each input feature."""

    def of(self, rows: Tensor) -> Tensor:
        return rows.sum(dim=0)


class AbsoluteMax(_Vector):
    """Largest absolute value of each input feature."""

    def update(self, expert: int, rows: Tensor, dense: Tensor) -> None:
        self.total[expert] = torch.maximum(self.total[expert], rows.float().abs().amax(dim=0).to(self.total))

    def join(self) -> None:
        self.total = self.world.greatest(self.total)

    def value(self, expert: int, sequences: int) -> Tensor:
        return self.total[expert]


class Gram:
    """XᵀX in float32. Only the blocks on and above the diagonal are computed: 5/8 of the products.

    Several processes add their sums, which rounds otherwise than one process that adds batch after batch. Experts that
    are dealt out among them (:class:`sparsify.prune.parts.Part`) have their matrices where they are pruned alone.
    """

    BLOCKS, LEAST = 4, 64

    def __init__(self, experts: int, features: int, device: torch.device, world: World = ALONE) -> None:
        self.experts, self.features, self.device, self.world = experts, features, device, world
        self._sums: dict[int, Tensor] = {}  # an expert that sees no token costs nothing
        self._elsewhere = set[int]()

    def update(self, expert: int, rows: Tensor, dense: Tensor) -> None:
        rows = rows.float()
        for start, part in self._parts(self._of(expert)):
            part.addmm_(rows[:, start : start + len(part)].t(), rows[:, start:])

    def join(self) -> None:
        # Experts that no process has rows of stay without a matrix.
        seen = set[int]().union(*self.world.told(sorted(self._sums)))
        dealt = self.world.divided and self.experts >= self.world.size
        for expert in sorted(seen):
            parts = [part for _, part in self._parts(self._of(expert))]
            own = torch.cat([part.flatten() for part in parts])
            owner = self.world.owner(self.experts, expert) if dealt else None
            whole = self.world.summed(own) if owner is None else self.world.summed_by(own, owner)
            if owner not in (None, self.world.rank):
                # Nobody asks this process for it.
                del self._sums[expert]
                self._elsewhere.add(expert)
                continue
            for part, added in zip(parts, whole.split([part.numel() for part in parts]), strict=True):
                part.copy_(added.view(part.shape))

    def _parts(self, total: Tensor) -> Iterator[tuple[int, Tensor]]:
        """What is computed of a matrix, as views: some rows from their first column on, and which that is."""
        size = max(self.LEAST, -(-self.features // self.BLOCKS))
        for start in range(0, self.features, size):
            yield start, total[start : start + size, start:]

    def value(self, expert: int, sequences: int) -> Tensor:
        total = self._of(expert).triu_()
        total += total.triu(1).t()
        return total / sequences

    def _of(self, expert: int) -> Tensor:
        assert expert not in self._elsewhere, f"the matrix of expert {expert}, which another process prunes"
        if expert not in self._sums:
            size = (self.features, self.features)
            self._sums[expert] = torch.zeros(size, dtype=torch.float32, device=self.device)
        return self._sums[expert]


class CrossGram(Gram):
    """X₀ᵀX in float32: the same input in the dense and in the pruned model."""

    def update(self, expert: int, rows: Tensor, dense: Tensor) -> None:
        self._of(expert).addmm_(dense.float().t(), rows.float())

    def _parts(self, total: Tensor) -> Iterator[tuple[int, Tensor]]:
        yield 0, total

    def value(self, expert: int, sequences: int) -> Tensor:
        return self._of(expert) / sequences


ACCUMULATORS: dict[str, type[Accumulator]] = {
    "squared_norm": SquaredNorm,
    "absolute_sum": AbsoluteSum,
    "absolute_max": AbsoluteMax,
    "sum": Sum,
    "gram": Gram,
    "cross_gram": CrossGram,
}
# Not of the input but of the weight: made by a backward sweep, not by the recorder.
GRADIENTS = frozenset({"gradient_l1", "gradient_l2", "gradient_platon", "gradient"})
# What only the model as it was given can tell.
DENSE = frozenset({"cross_gram", "dense_weight"})
# Of one site's output: recorded by a product with its weight.
OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "output_absolute": lambda y: y.abs().sum(dim=0),
    "output_sum": lambda y: y.sum(dim=0),
    "output_square": lambda y: y.square().sum(dim=0),
    "output_gram": lambda y: y.t() @ y,
}
