"""Modules of a transformers model whose weights stay packed, under the names that the dense ones have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sparsify.backends.packed.format import PackedSite
from sparsify.backends.packed.loaded.experts import is_stack, packed_experts
from sparsify.backends.packed.loaded.linear import PackedLinear, hold, leaves_graph
from sparsify.backends.packed.loaded.product import Product
from sparsify.errors import CheckpointError
from sparsify.runtime.codes import row_starts
from sparsify.runtime.layout import Packed
from sparsify.runtime.ops import linear_dense

# Linear layers by the name of their class: exactly these forwards are y = x Wᵀ + b and nothing else.
LINEAR_CLASSES = ("Linear", "Conv1D", "FalconLinear")


class FastLinear(nn.Linear):
    """A dense linear layer of which one token runs our kernel: given to layers for which that was measured faster."""

    def forward(self, x: Tensor) -> Tensor:
        if leaves_graph(x):
            return super().forward(x)
        return linear_dense(x, self.weight, self.bias)


def unfit(model: nn.Module, parameter: str) -> str | None:
    """Why a packed ``parameter`` could not be run by a module of ``model``, or None where it can."""
    path, _, leaf = parameter.rpartition(".")
    try:
        owner = model.get_submodule(path)
    except AttributeError:
        return f"no module {path} in the model"
    kind, above = type(owner).__name__, model.get_submodule(path.rpartition(".")[0])
    # A packed layer takes the place of the dense one in its parent, but not in a list that its parent runs.
    if any(each is owner for held in vars(above).values() if isinstance(held, (list, tuple)) for each in held):
        return f"{type(above).__name__} holds it in a list of its own, where it cannot be exchanged"
    if (leaf == "weight" and kind in LINEAR_CLASSES) or is_stack(owner, leaf):
        return None
    return f"{kind} computes with its weight in its own way"


def pack_modules(
    model: nn.Module,
    sites: Mapping[str, PackedSite],
    siblings: Iterable[Sequence[str]] = (),
    *,
    exact: bool = False,
) -> None:
    """Replace the modules that own the parameters ``sites`` by packed ones, empty, where the dense weights lie.

    Args:
        siblings: parameters of linear layers that read one input, in the order in which the model runs them: on a GPU
            one product serves them all. exact: inputs of weights of few bits are not rounded to 8 bits.

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
        owner, leaf = owner_of(model, name)
        dense = getattr(owner, leaf)
        if leaf == "weight":
            packed = PackedLinear(site, owner.bias, dense.dtype, dense.device, exact=exact)
            replace(model, name, packed.train(owner.training))
            continue
        if "sites" not in vars(owner):
            become(owner, packed_experts(type(owner)))
            owner.sites, owner.exact = {}, exact
        owner.sites[leaf] = site
        delattr(owner, leaf)
        hold(owner, leaf, site, dense.dtype, dense.device)
    for group in siblings:
        join(model, group)


def join(model: nn.Module, parameters: Sequence[str]) -> None:
    """Let one product serve ``parameters`` on a GPU; those that are not 2:4 linear layers of one width stay alone."""
    owners = [model.get_submodule(name.rpartition(".")[0]) for name in parameters]
    members = [m for m in owners if isinstance(m, PackedLinear) and m.site.layout == "packed24"]
    if len(members) > 1 and len({(m.in_features, m.site.bits, m.site.group) for m in members}) == 1:
        product = Product(members)
        for member in members:
            member.product = product


def packed_of(model: nn.Module, name: str, site: PackedSite) -> Packed:
    """The packed matrix of parameter ``name`` as it lies in ``model``."""
    owner, leaf = owner_of(model, name)
    if isinstance(owner, PackedLinear):
        return owner.packed()
    return site.packed(lambda part: getattr(owner, leaf + part).detach())


def count_rows(model: nn.Module, sites: Mapping[str, PackedSite]) -> None:
    """Fill in where each row of a bitmask begins, now that the masks are there."""
    for name, site in sites.items():
        if site.layout == "bitmask":
            owner, leaf = owner_of(model, name)
            mask = getattr(owner, f"{leaf}_mask").flatten(0, -2)
            owner.register_buffer(f"{leaf}_starts", row_starts(mask, site.bits), persistent=False)


def owner_of(model: nn.Module, parameter: str) -> tuple[Any, str]:
    """The module that holds ``parameter``, and what it is called there."""
    path, _, leaf = parameter.rpartition(".")
    return model.get_submodule(path), leaf


def replace(model: nn.Module, parameter: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the one that holds ``parameter``."""
    parent, _, child = parameter.rpartition(".")[0].rpartition(".")
    model.get_submodule(parent)._modules[child] = module


def become(module: Any, kind: type[nn.Module]) -> None:
    """Make ``module`` one of another class that has the same attributes."""
    module.__class__ = kind
