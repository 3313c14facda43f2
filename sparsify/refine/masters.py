"""What a region trains: copies in float32, of which the model computes with what would be written of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.ir.weights import Weights


@dataclass
class Masters:
    """Trained parameters by name.

    Attributes:
        values: float32 leaves, in each parameter's own shape. kept: True where an entry is trained; None: everywhere.
    """

    values: dict[str, Tensor]
    kept: Mapping[str, Tensor | None]

    @classmethod
    def of(cls, weights: Weights, kept: Mapping[str, Tensor | None], device: torch.device) -> Masters:
        values = {n: weights.read(n).to(device, torch.float32).detach().clone().requires_grad_() for n in kept}
        return cls(values, {n: None if mask is None else mask.to(device) for n, mask in kept.items()})

    def stored(self, weights: Weights) -> dict[str, Tensor]:
        """Each in the dtype in which the checkpoint stores it."""
        return {name: value.detach().to(weights.dtype(name)) for name, value in self.values.items()}

    def sizes(self) -> dict[str, float]:
        """The root mean square of the entries that are trained."""
        found = {}
        for name, value in self.values.items():
            mask = self.kept[name]
            chosen = value.detach() if mask is None else value.detach()[mask]
            found[name] = float(chosen.square().mean().sqrt()) if chosen.numel() else 0.0
        return found

    def hold(self, names: Sequence[str]) -> None:
        """Take from the gradients what belongs to entries that are not trained."""
        for name in names:
            mask, value = self.kept[name], self.values[name]
            if mask is not None and value.grad is not None:
                value.grad.mul_(mask)
