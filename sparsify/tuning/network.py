"""What is trained: the model itself, or LoRA around its linear layers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sparsify.errors import SpecError
from sparsify.frontend.materialize import materialize
from sparsify.frontend.source import Source
from sparsify.host import quiet
from sparsify.tuning.recipe import Recipe


def build_network(
    source: Source, recipe: Recipe, device: torch.device, layers: Sequence[str] = ()
) -> tuple[nn.Module, nn.Module]:
    """The model in memory, and what is trained: itself in float32, or it with LoRA around its linear layers.

    Args:
        layers: the names of those that LoRA is put on; every one but the head where there are none.

    Raises:
        SpecError: LoRA without the package peft, or of a rank that no matrix has.
    """
    torch.manual_seed(recipe.seed)
    names = set(source.weights.parameters())
    network: Any = materialize(source, source.weights, names).to(device)
    network.config.use_cache = False
    if recipe.method == "full":
        return network, network.float().requires_grad_(True).train()
    try:
        import peft
    except ImportError as error:
        raise SpecError(
            "--method lora", found="the package peft is not installed", do="pip install 'sparsify-fx[tune]'"
        ) from error
    widest = max((min(p.shape[-2:]) for p in network.parameters() if p.dim() > 1), default=1)
    if recipe.rank > widest:
        raise SpecError(
            f"rank {recipe.rank}",
            found=f"no matrix of {source.name} has a rank above {widest}",
            do="Give --rank 8, say",
        )
    config = peft.LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=list(layers) or "all-linear",
        bias="none",
        task_type="CAUSAL_LM",
    )
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(network.requires_grad_(False), config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return network, wrapped.train()
