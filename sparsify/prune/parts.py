"""Which part of a weight each process prunes, and how the parts come together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from sparsify.world.world import World

Divided = Literal["whole", "experts", "rows", "owner"]


@dataclass(frozen=True)
class Part:
    """What this process prunes of a stack of matrices [experts, out_features, in_features].

    Attributes:
        how: by what it is divided: ``experts``; ``rows``, output neurons, where a method prunes each alone; ``owner``,
            nothing, and one process has all of it; ``whole``, by nothing in a process that is alone.
        experts, rows: what this process prunes. matrices: the stack with these pruned. biases: [experts, out_features].
    """

    how: Divided
    experts: Sequence[int]
    rows: slice
    owner: int
    matrices: Tensor = field(default_factory=lambda: torch.empty(0))
    biases: Tensor | None = None
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, world: World, experts: int, rows: int, by_rows: bool, owner: int) -> Part:
        """Args:
        by_rows: whether the method prunes each output neuron alone.
        """
        every = slice(0, rows)
        if not world.divided:
            return cls("whole", range(experts), every, owner)
        if experts >= world.size:
            return cls("experts", range(*world.bounds(experts)), every, owner)
        if by_rows and rows >= world.size:
            return cls("rows", range(experts), slice(*world.bounds(rows)), owner)
        return cls("owner", range(experts if world.rank == owner else 0), every, owner)

    def together(self, world: World, before: Tensor | None) -> tuple[Tensor, Tensor | None, list[str]]:
        """The whole stack, its biases and what is to be said of it, from the parts of all processes.

        Args:
            before: the biases as they were, which no part may have changed.
        """
        if self.how == "whole":
            return self.matrices, self.biases, self.notes
        said = world.told([self.notes, self.biases is not before])
        notes, biases = [note for own, _ in said for note in own], before
        if any(changed for _, changed in said) and self.biases is not None:
            # What others bring is written into it, and as it was it may be the model's own.
            biases = self._whole(world, self.biases.clone())
        # A divided matrix is said the same of by all: its inputs are the same.
        return self._whole(world, self.matrices), biases, list(dict.fromkeys(notes))

    def _whole(self, world: World, own: Tensor) -> Tensor:
        if self.how == "owner":
            return world.given(own, self.owner)
        if self.how == "experts":
            return torch.cat(world.gathered(own[self.experts.start : self.experts.stop]))  # type: ignore[attr-defined]
        return torch.cat(world.gathered(own[:, self.rows].transpose(0, 1))).transpose(0, 1).contiguous()
