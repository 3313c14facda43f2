"""A model small enough to be pruned by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Chain(nn.Module):
    """Two blocks of two linears, whose inputs can be computed by hand."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x
