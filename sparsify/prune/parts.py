"""Which part of a weight each process prunes, and how the parts come together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from sparsify.prune.sending import FORMS, Form, form_of, packed, unpacked
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

    def together(self, world: World, dense: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor | None, list[str]]:
        """The whole stack, its biases and what is to be said of it, from the parts of all processes.

        Args:
            dense: the stack as it was. before: the biases as they were, which no part may have changed.
        """
        if self.how == "whole":
            return self.matrices, self.biases, self.notes
        own, was = self._of(self.matrices, world.rank, world), self._of(dense, world.rank, world)
        said = world.told([self.notes, self.biases is not before, FORMS.index(form_of(own, was))])
        notes, biases = [note for own_notes, *_ in said for note in own_notes], before
        if any(changed for _, changed, _ in said) and self.biases is not None:
            # What others bring is written into it, and as it was it may be the model's own.
            biases = self._whole(world, self.biases.clone(), self.biases, "whole")
        # What all parts can be sent as; of one that a single process has the others have nothing to send.
        form = FORMS[max(number for *_, number in said)]
        # A divided matrix is said the same of by all: its inputs are the same.
        return self._whole(world, self.matrices, dense, form), biases, list(dict.fromkeys(notes))

    def _of(self, stack: Tensor, rank: int, world: World) -> Tensor:
        """What process ``rank`` prunes of a stack [experts, out_features, …]; of an owner's the whole."""
        if self.how == "experts":
            start, stop = world.bounds(len(stack), rank)
            return stack[start:stop]
        if self.how == "rows":
            start, stop = world.bounds(stack.shape[1], rank)
            return stack[:, start:stop]
        return stack

    def _whole(self, world: World, own: Tensor, dense: Tensor, form: Form) -> Tensor:
        if self.how == "owner":
            mine = iter(packed(own, form) if world.rank == self.owner else ())

            def given(count: int, dtype: torch.dtype) -> Tensor:
                return world.given(next(mine, torch.empty(count, dtype=dtype, device=own.device)), self.owner)

            return unpacked(dense, form, given)
        came = [world.gathered(piece) for piece in packed(self._of(own, world.rank, world), form)]
        parts = []
        for rank in range(world.size):
            pieces = iter([of[rank] for of in came])
            parts.append(unpacked(self._of(dense, rank, world), form, lambda *_, pieces=pieces: next(pieces)))
        return torch.cat(parts, dim=0 if self.how == "experts" else 1)
