"""Experts of the checkpoints of :mod:`.orphans`, which lie there one by one, packed as a stack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.backends.vllm.matrices import columns_cut, converted, fitting, lost, rows_cut
from sparsify.backends.vllm.orphans import Orphan, Orphans, tensors_of
from sparsify.backends.vllm.stacks import Rank
from sparsify.runtime.layout import Packed, choose_layout, concatenate, pack, unpack


@dataclass(frozen=True)
class OrphanStack:
    """What vLLM stacks of a layer's experts.

    Attributes:
        name: of the stack. prefix: of the experts' modules.
    """

    name: str
    prefix: str
    orphans: Orphans

    # No dense stack lies beside it, but single experts.
    dense = False

    @property
    def tensors(self) -> Mapping[str, torch.dtype | None]:
        return tensors_of(self.orphans.form)

    def modules(self, layer: Any, expert: int) -> dict[str, str]:
        """The modules of an expert, by what vLLM calls the shards of this stack."""
        names = {"w2": layer.ckpt_down_proj_name}
        if not self.name.endswith("w2"):
            names = {"w1": layer.ckpt_gate_proj_name, "w3": layer.ckpt_up_proj_name}
        return {shard: f"{self.prefix}.{expert}.{name}" for shard, name in names.items()}

    def arrivals(self, layer: Any, shards: Sequence[str], shape: tuple[int, int, int], rank: Rank) -> OrphanArrivals:
        """Args:
        shape: of the whole stack, [experts, rows, columns].
        """
        modules = {expert: self.modules(layer, expert) for expert in rank.experts}
        awaited = {(e, shard): self.orphans.orphan(modules[e][shard]) for e in rank.experts for shard in shards}
        return OrphanArrivals(awaited, (shape[1] // len(shards), shape[2]), rank)


class OrphanArrivals:
    """The experts of a rank, of which vLLM hands over a tensor at a time, each packed as soon as it is complete.

    Args:
        awaited: by expert and shard, in the order in which they are stacked. shape: of one, [rows, columns].
    """

    def __init__(self, awaited: Mapping[tuple[int, str], Orphan], shape: tuple[int, int], rank: Rank) -> None:
        self.awaited, self.shape, self.rank = awaited, shape, rank
        self._parts: dict[tuple[int, str], Packed | Tensor] = {}

    def load(
        self,
        part: str,
        param: nn.Parameter,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool:
        """vLLM's ``weight_loader`` of experts.

        Raises:
            CheckpointError: an expert of another shape, or tensors that do not fit.
        """
        orphan = self.awaited.get((expert_id, shard_id))
        if orphan is None:
            return False  # another rank's
        matrix = orphan.add(part, loaded_weight)
        if matrix is None:
            return True
        fitting(orphan.name, matrix.shape, self.shape)
        # This rank's columns of what leads back to the hidden size, and its rows of what leads from it.
        cut, first = columns_cut if shard_id == "w2" else rows_cut, self.rank.rank * self.rank.inner
        self._parts[expert_id, shard_id] = cut(converted(matrix, self.rank.dtype), first, self.rank.inner)
        return True

    def complete(self) -> Packed | Tensor:
        """All of them, one below the other; [experts, rows, columns] where they are dense.

        Raises:
            CheckpointError: tensors that did not come.
        """
        late = next((orphan for key, orphan in self.awaited.items() if key not in self._parts), None)
        if late is not None:
            raise lost(late.missing[0])
        parts = [self._parts.pop(key) for key in self.awaited]
        packed = [part for part in parts if isinstance(part, Packed)]
        if len(packed) == len(parts) and len({part.layout for part in packed}) == 1:
            return concatenate(packed)
        # Packed in several ways, or not all of them: what serves the whole.
        full = torch.cat([unpack(part) if isinstance(part, Packed) else part for part in parts])
        layout = choose_layout(full)
        return pack(full, layout) if isinstance(layout, str) else full.view(len(self.rank.experts), -1, full.shape[1])
