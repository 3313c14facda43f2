"""Packed modules of a loaded model made dense again."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from sparsify.backends.packed.format import PackedSite
from sparsify.backends.packed.loaded.modules import FastLinear, become, owner_of, packed_of, replace
from sparsify.runtime.layout import Packed


def dense_modules(
    model: nn.Module, sites: Mapping[str, PackedSite], unpack: Callable[[Packed, Tensor | None], Tensor]
) -> nn.Module:
    """``model`` with its packed modules made dense again, in place."""
    from transformers.pytorch_utils import Conv1D

    for name, site in sites.items():
        owner, leaf = owner_of(model, name)
        starts = getattr(owner, f"{leaf}_starts", None)
        weight = nn.Parameter(site.parameter(unpack(packed_of(model, name, site), starts)), requires_grad=False)
        if leaf != "weight":
            for part in (*site.parts, "_starts"):
                if hasattr(owner, leaf + part):
                    delattr(owner, leaf + part)
            owner.register_parameter(leaf, weight)
            owner.sites.pop(leaf)
            continue
        with torch.device("meta"):
            dense = Conv1D(site.rows, site.columns) if site.transposed else nn.Linear(site.columns, site.rows)
        dense.weight, dense.bias = weight, owner.bias
        replace(model, name, dense.train(owner.training))
        if (hook := getattr(owner, "_hf_hook", None)) is not None:
            # accelerate brings a layer's inputs to its device by this.
            from accelerate.hooks import add_hook_to_module

            add_hook_to_module(dense, hook)
    for module in model.modules():
        if type(module) is FastLinear:
            become(module, nn.Linear)
    return model
