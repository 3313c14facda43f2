"""Modules of a transformers model whose weights stay packed, under the names that the dense ones have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.backends.packed.format import CODES, PackedSite
from sparsify.backends.packed.loaded.linear import PackedLinear, Product, hold
from sparsify.errors import CheckpointError
from sparsify.runtime.layout import Packed, row_starts
from sparsify.runtime.ops import experts_24, experts_bitmask, linear_dense

# Linear layers by the name of their class: exactly these forwards are y = x Wᵀ + b and nothing else.
LINEAR_CLASSES = ("Linear", "Conv1D", "FalconLinear")


class FastLinear(nn.Linear):
    """A dense linear layer of which one token runs our kernel: given to layers for which that was measured faster."""

    def forward(self, x: Tensor) -> Tensor:
        return linear_dense(x, self.weight, self.bias)


@cache
def packed_experts(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of transformers' experts whose stacks may be packed."""
    return type(f"Packed{kind.__name__}", (kind,), {"forward": _experts_forward, "sites": {}})


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
    if self.has_post_expert_norm:
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
    elif site.layout == "packed24":
        y = experts_24(x, weight, getattr(module, f"{name}_meta"), offsets)
    else:
        y = experts_bitmask(x, weight, getattr(module, f"{name}_mask"), getattr(module, f"{name}_starts"), offsets)
    return y + getattr(module, f"{name}_bias")[experts] if module.has_bias else y


def unfit(model: nn.Module, parameter: str) -> str | None:
    """Why a packed ``parameter`` could not be run by a module of ``model``, or None where it can."""
    path, _, leaf = parameter.rpartition(".")
    try:
        owner = model.get_submodule(path)
    except AttributeError:
        return f"no module {path} in the model"
    kind = type(owner).__name__
    if leaf == "weight" and kind in LINEAR_CLASSES:
        return None
    stack = leaf in ("gate_up_proj", "up_proj", "down_proj")
    if stack and hasattr(owner, "_apply_gate") and hasattr(owner, "has_gate") and hasattr(owner, "is_transposed"):
        return None
    return f"{kind} computes with its weight in its own way"


def pack_modules(model: nn.Module, sites: Mapping[str, PackedSite], siblings: Iterable[Sequence[str]] = ()) -> None:
    """Replace the modules that own the parameters ``sites`` by packed ones, empty, where the dense weights lie.

    Args:
        siblings: parameters of linear layers that read one input, in the order in which the model runs them: on a GPU
            one product serves them all.

    Raises:
        CheckpointError: a parameter that the model has not, or whose module cannot run packed.
    """
    for name, site in sites.items():
        reason = unfit(model, name)
        if reason is None and model.get_parameter(name).shape != site.shape:
            reason = f"it is {list(site.shape)} there and {list(model.get_parameter(name).shape)} by config.json"
        if reason is not None:
            raise CheckpointError(
                f"packed parameter {name}", found=reason, do="Do config.json and the weights belong to one model?"
            )
        path, _, leaf = name.rpartition(".")
        owner: Any = model.get_submodule(path)
        dense = getattr(owner, leaf)
        if leaf == "weight":
            parent, _, child = path.rpartition(".")
            packed = PackedLinear(site, owner.bias, dense.dtype, dense.device)
            model.get_submodule(parent)._modules[child] = packed.train(owner.training)
            continue
        if "sites" not in vars(owner):
            kind: type[nn.Module] = type(owner)
            owner.__class__ = packed_experts(kind)  # type: ignore[arg-type]
            owner.sites = {}
        owner.sites[leaf] = site
        delattr(owner, leaf)
        hold(owner, leaf, site, dense.dtype, dense.device)
    for group in siblings:
        join(model, group)


def join(model: nn.Module, parameters: Sequence[str]) -> None:
    """Let one product serve ``parameters`` on a GPU; those that are not 2:4 linear layers of one width stay alone."""
    owners = [model.get_submodule(name.rpartition(".")[0]) for name in parameters]
    members = [m for m in owners if isinstance(m, PackedLinear) and m.site.layout == "packed24"]
    if len(members) > 1 and len({m.in_features for m in members}) == 1:
        product = Product(members)
        for member in members:
            member.product = product


def stacks(model: nn.Module) -> Iterator[tuple[str, PackedSite, Tensor]]:
    """Every packed stack of experts in ``model``: its name, site and values."""
    for path, module in model.named_modules():
        sites: Any = getattr(module, "sites", None)
        if type(module).__name__.startswith("Packed") and isinstance(sites, dict):
            for leaf, site in sites.items():
                yield f"{path}.{leaf}", site, getattr(module, leaf)


def packed_of(model: nn.Module, name: str, site: PackedSite) -> Packed:
    """The packed matrix of parameter ``name`` as it lies in ``model``."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if isinstance(owner, PackedLinear):
        return owner.packed()
    return site.packed(getattr(owner, leaf).data, getattr(owner, f"{leaf}_{CODES[site.layout]}"))


def count_rows(model: nn.Module, sites: Mapping[str, PackedSite]) -> None:
    """Fill in where each row of a bitmask begins, now that the masks are there."""
    for name, site in sites.items():
        if site.layout == "bitmask":
            path, _, leaf = name.rpartition(".")
            owner = model.get_submodule(path)
            mask = getattr(owner, f"{leaf}_mask").flatten(0, -2)
            owner.register_buffer(f"{leaf}_starts", row_starts(mask), persistent=False)
