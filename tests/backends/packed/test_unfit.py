"""Which linear layers cannot be run packed, whatever their weights are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsify.backends.packed.loaded.modules import unfit


class Listed(nn.Module):
    """As the heads of MaskFormer, Mask2Former and OneFormer: it runs a list of its own, not its submodules."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(8, 8), nn.ReLU()]
        for at, layer in enumerate(self.layers):
            self.add_module(str(at), layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_what_a_list_holds_too_stays_dense() -> None:
    model = nn.Sequential(Listed(), nn.ModuleList([nn.Linear(8, 8)]), nn.Linear(8, 8))
    assert "Listed holds it in a list of its own" in str(unfit(model, "0.0.weight"))
    assert unfit(model, "1.0.weight") is None and unfit(model, "2.weight") is None
    assert torch.equal(model[0](torch.zeros(1, 8)), model[0].layers[0](torch.zeros(1, 8)).relu())
