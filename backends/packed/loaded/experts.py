"""Stacks of experts whose weights stay packed, in the modules that transformers has for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.backends.packed.format import PackedSite
from sparsify.backends.packed.loaded.linear import leaves_graph, product_of
from sparsify.runtime.packed_weight import operator_of

# One class for each of transformers'.
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def packed_experts(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of transformers' experts whose stacks may be packed."""
    if kind not in _CLASSES:
        _CLASSES[kind] = type(f"Packed{kind.__name__}", (kind,), {"forward": _experts_forward, "sites": {}})
    return _CLASSES[kind]


def is_stack(owner: nn.Module, leaf: str) -> bool:
    """Whether ``owner`` is such experts and ``leaf`` one of their stacks."""
    known = all(hasattr(owner, name) for name in ("_apply_gate", "has_gate", "is_transposed"))
    return known and leaf in ("gate_up_proj", "up_proj", "down_proj")


def stacks(model: nn.Module) -> Iterator[tuple[str, PackedSite, Tensor]]:
    """Every packed stack of experts in ``model``: its name, site and values."""
    for path, module in model.named_modules():
        if type(module) in _CLASSES.values():
            sites: dict[str, PackedSite] = vars(module).get("sites", {})
            for leaf, site in sites.items():
                yield f"{path}.{leaf}", site, getattr(module, leaf)


def _experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts by transformers' own interface (``integrations.moe``), tokens sorted by expert.

    Args:
        hidden_states: [tokens, hidden]. ``top_k_index``, ``top_k_weights``: [tokens, k].
    """
    tokens, chosen = top_k_index.shape
    experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
    numbers = torch.arange(self.num_experts, device=experts.device)
    offsets = torch.searchsorted(experts, numbers, right=True)
    first = "gate_up_proj" if self.has_gate else "up_proj"
    x = _stack_product(self, first, hidden_states[order // chosen], experts, offsets)
    x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
    x = _stack_product(self, "down_proj", x, experts, offsets)
    # Before transformers 5.20 experts have none, and do not say so.
    if getattr(self, "has_post_expert_norm", False):
        x = self.post_expert_norm(x)
    weighted = x * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(weighted)
    back[order] = weighted
    return back.view(tokens, chosen, -1).sum(1).to(hidden_states.dtype)


def _stack_product(module: Any, name: str, x: Tensor, experts: Tensor, offsets: Tensor) -> Tensor:
    weight = getattr(module, name)
    x = x.to(weight.dtype)
    site = module.sites.get(name)
    if site is None:
        from transformers.integrations.moe import _grouped_mm

        y = _grouped_mm(x, weight if module.is_transposed else weight.transpose(-2, -1), offs=offsets.int())
    else:
        y = (_outside if leaves_graph(x) else _packed_product)(module, name, site, x, offsets)
    return y + getattr(module, f"{name}_bias")[experts] if module.has_bias else y


def _packed_product(module: Any, name: str, site: PackedSite, x: Tensor, offsets: Tensor) -> Tensor:
    run = operator_of(site.layout, few=site.bits is not None, stacked=True)
    return run(x, *product_of(module, name, site, exact=module.exact), offsets)


# See PackedLinear.
_outside = torch.compiler.disable(_packed_product)
