"""A small pruned model, which of its weights are zero, and a few steps of training."""

from __future__ import annotations

from typing import Any

import torch
from support.families import build
from torch import Tensor, nn


def pruned() -> Any:
    """A llama whose matrices are 2:4 in its layers."""
    model = build("llama")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "layers" in name:
                weight.view(weight.shape[0], -1, 4)[..., :2] = 0
    return model


def zeros(model: nn.Module) -> dict[str, Tensor]:
    """Per matrix in a layer, by its name without the wrappings of peft and others, where it is zero."""
    found = {
        n.replace("base_model.model.", "").replace(".base_layer", "").removeprefix("module."): p.detach() == 0
        for n, p in model.named_parameters()
        if p.dim() == 2 and "layers" in n and "lora_" not in n
    }
    assert len(found) == 14
    return found


def unchanged(before: dict[str, Tensor], model: nn.Module) -> bool:
    """Whether zeros are where they were, and nowhere else."""
    return all(torch.equal(before[n], mask) for n, mask in zeros(model).items())


def learn(model: Any, optimizer: Any, steps: int = 3) -> None:
    ids = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
