"""The choice of what to pack, made again where a folder is loaded on another machine than it was measured on.

A folder says which processor, and which of its instruction sets, its choice was measured with. Elsewhere each distinct
shape is timed once, packed and dense, and what came out is kept in the cache folder; linear layers that are clearly
slower packed there are made dense in memory. The folder stays as it is.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from sparsify.backends.packed.format import PackedSite
from sparsify.backends.packed.loaded.dense import dense_modules
from sparsify.backends.packed.loaded.linear import PackedLinear
from sparsify.backends.packed.loaded.modules import owner_of
from sparsify.errors import SpecError
from sparsify.host import processor
from sparsify.runtime.cache import cache_folder, put_whole, read_object
from sparsify.runtime.cpu import native
from sparsify.runtime.cpu.build import source_hash
from sparsify.runtime.cpu.stopwatch import Stopwatch
from sparsify.runtime.cpu.unpacking import unpacked
from sparsify.runtime.packed_weight import PackedWeight


def this_machine() -> dict[str, str]:
    """What a choice that is measured here holds for, as ``measured`` of ``quantization_config`` says it."""
    return {"processor": processor(), "instructions": native.ISAS[native.isa()]}


def choose_again(model: nn.Module, sites: Mapping[str, PackedSite], measured: Mapping[str, str] | None) -> list[str]:
    """Make linear layers of ``model`` dense that are clearly slower packed on this machine; the names of their weights.

    Args:
        measured: :func:`this_machine` where the folder was written; None: nothing was measured, and nothing is here.

    One layer stays packed in any case: a model without any would be saved as what it is not.
    """
    if measured is None or dict(measured) == (here := this_machine()):
        return []
    known, found = _Known(here), dict[str, str]()
    with torch.no_grad():
        for name, site in sites.items():
            owner, leaf = owner_of(model, name)
            if leaf == "weight" and isinstance(owner, PackedLinear) and owner.weight.device.type == "cpu":
                slower = known.slower(owner, site)
                if slower is not None:
                    found[name] = slower
    known.keep()
    if len(found) == len(sites):
        found.pop(min(found, key=lambda name: sites[name].rows * sites[name].columns))
    if not found:
        return []
    gone = {id(owner_of(model, name)[0]) for name in found}
    dense_modules(model, {name: sites[name] for name in found}, unpacked)
    for module in model.modules():
        if isinstance(module, PackedLinear) and gone & set(map(id, module.product.members)):
            module.product = module.product.alone(module)
    name, slower = next(iter(found.items()))
    warnings.warn(
        f"{len(found)} of {len(sites)} packed weights run dense here, {name} for one: packed it {slower} on this "
        f"machine ({here['processor']}, {here['instructions']}). The folder was measured on {measured['processor']}, "
        f"{measured['instructions']}; one packed with choice=smallest stays packed everywhere",
        RuntimeWarning,
        stacklevel=2,
    )
    return list(found)


class _Known:
    """What was timed on this machine, by this version of the kernels and of torch; kept in the cache folder."""

    def __init__(self, here: Mapping[str, str]) -> None:
        self._watch: Stopwatch | None = None
        self._path: Path | None = None
        self._of = {**here, "kernels": source_hash(), "torch": torch.__version__}
        self._slower: dict[str, str | None] = {}
        with contextlib.suppress(SpecError):  # a user without a home: timed in every process
            self._path = cache_folder() / "choice.json"
        kept = {} if self._path is None else read_object(self._path)
        if kept.get("of") == self._of and isinstance(kept.get("slower"), dict):
            self._slower = {k: v for k, v in kept["slower"].items() if v is None or isinstance(v, str)}

    def slower(self, layer: PackedLinear, site: PackedSite) -> str | None:
        """How much slower the layer is packed; None where it is not clearly slower."""
        tenths = round(10 * site.values / max(1, site.rows * site.columns))
        dtype = str(layer.weight.dtype).removeprefix("torch.")
        key = f"{site.rows}x{site.columns} {dtype} {site.label} {site.group} {layer.exact} {tenths}"
        if key not in self._slower:
            self._watch = self._watch or Stopwatch()
            packed = layer.packed()
            starts = layer.weight_starts if site.layout == "bitmask" else None
            timing = self._watch.packed(unpacked(packed, starts), PackedWeight.holding(packed, exact=layer.exact))
            self._slower[key] = timing.slower
        return self._slower[key]

    def keep(self) -> None:
        if self._watch is not None and self._path is not None:
            put_whole(self._path, json.dumps({"of": self._of, "slower": self._slower}).encode())
