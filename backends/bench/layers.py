"""One token through every kind of linear layer of a model, the packed ones and the dense ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from sparsify.backends.bench.benchmark import SiteSpeed
from sparsify.backends.packed.format import PackedSite
from sparsify.backends.packed.labels import kind_of
from sparsify.backends.packed.loaded.modules import FastLinear, owner_of, packed_of
from sparsify.runtime.cpu.stopwatch import Stopwatch
from sparsify.runtime.cpu.unpacking import unpacked
from sparsify.runtime.packed_weight import PackedWeight

# What layers of one kind are, their shape, and how they lie or what runs them.
_PackedKind = tuple[str, tuple[int, ...], str]
_DenseKind = tuple[str, tuple[int, ...], Literal["ours", "torch"]]


def site_speeds(model: nn.Module, sites: Mapping[str, PackedSite]) -> list[SiteSpeed]:
    """Every kind of linear layer once; experts are not timed."""
    watch = Stopwatch(alone=False)
    return [*_packed_speeds(model, sites, watch), *_dense_speeds(model, watch)]


def _packed_speeds(model: nn.Module, sites: Mapping[str, PackedSite], watch: Stopwatch) -> list[SiteSpeed]:
    found: dict[_PackedKind, list[str]] = {}
    for name, site in sites.items():
        stack = () if site.experts is None else (site.experts,)
        shape = (*stack, site.rows, site.columns)
        found.setdefault((kind_of(name), shape, site.label), []).append(name)
    rows = []
    for (kind, shape, layout), names in found.items():
        site = sites[names[0]]
        timing = None
        if site.experts is None:
            owner, _ = owner_of(model, names[0])
            weight = PackedWeight.holding(packed_of(model, names[0], site), exact=owner.exact)
            timing = watch.packed(unpacked(weight.packed, weight.starts), weight)
        rows.append(SiteSpeed(kind, len(names), shape, layout, "packed", timing))
    return rows


def _dense_speeds(model: nn.Module, watch: Stopwatch) -> list[SiteSpeed]:
    found: dict[_DenseKind, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            kernel: Literal["ours", "torch"] = "ours" if isinstance(module, FastLinear) else "torch"
            kind = (kind_of(f"{name}.weight"), tuple(module.weight.shape), kernel)
            found.setdefault(kind, []).append(module.weight)
    return [
        SiteSpeed(kind, len(weights), shape, "dense", kernel, watch.dense(weights[0].detach()))
        for (kind, shape, kernel), weights in found.items()
    ]
