"""Stacks of experts as vLLM hands them over, and what of them a rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.backends.vllm.matrices import Site, converted, fitting, lost, whole
from sparsify.runtime.layout import Packed, concatenate
from sparsify.runtime.shard import columns_of, rows_of


@dataclass(frozen=True)
class Rank:
    """What a rank holds of stacks.

    Attributes:
        experts: which of them, in its order. rank, ranks: of those that share each expert. inner: its features between
            the two stacks.
    """

    experts: tuple[int, ...]
    rank: int
    ranks: int
    inner: int
    dtype: torch.dtype

    def gates(self, stack: Packed | Tensor) -> Packed | Tensor:
        """Of each expert this rank's rows of the gate, and below them those of the other half."""
        half, first = self.ranks * self.inner, self.rank * self.inner
        if isinstance(stack, Tensor):
            return stack.unflatten(1, (2, half))[list(self.experts), :, first : first + self.inner].flatten(1, 2)
        starts = [(2 * expert + upper) * half + first for expert in self.experts for upper in (0, 1)]
        if starts == list(range(0, stack.shape[0], self.inner)):
            return rows_of(stack, 0, stack.shape[0])
        return concatenate([rows_of(stack, start, self.inner) for start in starts])

    def downs(self, stack: Packed | Tensor, experts: int) -> Packed | Tensor:
        """Of each expert this rank's columns.

        Args:
            experts: how many ``stack`` has.
        """
        first = self.rank * self.inner
        if isinstance(stack, Tensor):
            return stack[list(self.experts), :, first : first + self.inner].contiguous()
        part = columns_of(stack, first, self.inner)
        if isinstance(part, Tensor):
            return part.view(experts, -1, self.inner)[list(self.experts)]
        if self.experts == tuple(range(experts)):
            return part
        rows = stack.shape[0] // experts
        return concatenate([rows_of(part, expert * rows, rows) for expert in self.experts])


@dataclass
class Stack(Site):
    """A stack of a packed folder, or one that is dense beside a packed one."""

    @property
    def dense(self) -> bool:
        return self.site is None

    def arrivals(self, layer: Any, shards: Sequence[str], shape: tuple[int, int, int], rank: Rank) -> StackArrivals:
        """Args:
            shape: of the whole stack, [experts, rows, columns].

        Raises:
            CheckpointError: the stack is of another.
        """
        site = self.site
        if site is not None:
            matrix = (site.rows, site.columns)
            fitting(self.name, matrix if site.experts is None else (site.experts, *matrix), shape)
        return StackArrivals(self, shards, shape[0], rank)


class StackArrivals:
    """One stack, of which vLLM hands over a slice at a time, an expert's rows of one of ``shards``; or a whole
    tensor of it, where its loader knows single experts alone and takes ours for any parameter.

    Args:
        experts: how many the model has. rank: what of them is this rank's.
    """

    def __init__(self, awaited: Site, shards: Sequence[str], experts: int, rank: Rank) -> None:
        self.awaited, self.shards, self.experts, self.rank = awaited, tuple(shards), experts, rank
        self.stack: Packed | Tensor | None = None
        self._slices: dict[str, dict[tuple[int, str], Tensor]] = {}
        self._wholes: dict[str, Tensor] = {}

    def load(
        self,
        part: str,
        param: nn.Parameter,
        loaded_weight: Tensor,
        weight_name: str = "",
        shard_id: str = "",
        expert_id: int | None = None,
        return_success: bool = False,
    ) -> bool:
        """vLLM's ``weight_loader`` of experts, and without one that of any parameter."""
        part = part.removeprefix("weight")
        if expert_id is None:
            self._wholes[part] = loaded_weight
        else:
            self._slices.setdefault(part, {})[expert_id, shard_id] = loaded_weight
        if all(self._arrived(part) for part in self._wanted):
            self._finish()
        return True

    @property
    def _wanted(self) -> list[str]:
        return [""] if self.awaited.site is None else list(self.awaited.site.parts)

    def _arrived(self, part: str) -> bool:
        """A bitmask's numbers, which have no axis of experts, come whole, once for each of ``shards``."""
        if part in self._wholes:
            return True
        slices = self._slices.get(part, {})
        flat = bool(slices) and next(iter(slices.values())).dim() == 1
        return len(slices) == len(self.shards) * (1 if flat else self.experts)

    def _finish(self) -> None:
        found = {part: self._put_together(part) for part in self._wanted}
        name, site = self.awaited.name, self.awaited.site
        stack = converted(found[""] if site is None else whole(name, site, found), self.rank.dtype)
        self.stack = self.rank.gates(stack) if len(self.shards) > 1 else self.rank.downs(stack, self.experts)

    def _put_together(self, part: str) -> Tensor:
        if part in self._wholes:
            return self._wholes.pop(part)
        slices = self._slices.pop(part)
        first = next(iter(slices.values()))
        if first.dim() == 1:
            return first
        return torch.stack([torch.cat([slices[e, shard] for shard in self.shards]) for e in range(self.experts)])

    def complete(self) -> Packed | Tensor:
        """The stack, which is kept no longer: vLLM keeps what loads a layer's parameters.

        Raises:
            CheckpointError: tensors that did not come.
        """
        stack, self.stack = self.stack, None
        if stack is None:
            raise lost(self.awaited.name + next(part for part in self._wanted if not self._arrived(part)))
        return stack
