"""The choice of what to pack, made again where a folder is loaded on another machine than it was measured on.

A folder says which processor, and which of its instruction sets, its choice was measured with. Elsewhere each distinct
shape is timed once, packed and dense, and what came out is kept in the cache folder; linear layers that are clearly
slower packed there are made dense in memory. The folder stays as it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import nn

from sparsify.backends.packed.format import PackedSite
from sparsify.backends.packed.loaded.dense import dense_modules
from sparsify.backends.packed.loaded.known import Known, key_of, this_machine
from sparsify.backends.packed.loaded.linear import PackedLinear
from sparsify.backends.packed.loaded.modules import owner_of
from sparsify.runtime.cpu.stopwatch import Stopwatch
from sparsify.runtime.cpu.unpacking import unpacked
from sparsify.runtime.layout import Packed
from sparsify.runtime.packed_weight import PackedWeight


def choose_again(model: nn.Module, sites: Mapping[str, PackedSite], measured: Mapping[str, str] | None) -> list[str]:
    """Make linear layers of ``model`` dense that are clearly slower packed on this machine; the names of their weights.

    Args:
        measured: :func:`this_machine` where the folder was written; None: nothing was measured, and nothing is here.

    One layer stays packed in any case: a model without any would be saved as what it is not.
    """
    if measured is None or dict(measured) == (here := this_machine()):
        return []
    known, found = _Known(), dict[str, str]()
    with torch.no_grad():
        for name in sites:
            owner, leaf = owner_of(model, name)
            if leaf == "weight" and isinstance(owner, PackedLinear) and owner.weight.device.type == "cpu":
                slower = known.slower(owner)
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
    """What packed layers were timed to take."""

    def __init__(self) -> None:
        self._watch: Stopwatch | None = None
        self._known = Known("choice.json", "slower", lambda found: found is None or isinstance(found, str))

    def slower(self, layer: PackedLinear) -> str | None:
        """How much slower the layer is packed; None where it is not clearly slower."""
        packed = layer.packed()
        key = key_of(packed, exact=layer.exact)
        found: str | None = self._known.of(key, lambda: self._measured(layer, packed))
        return found

    def _measured(self, layer: PackedLinear, packed: Packed) -> str | None:
        self._watch = self._watch or Stopwatch()
        starts = layer.weight_starts if packed.layout == "bitmask" else None
        return self._watch.packed(unpacked(packed, starts), PackedWeight.holding(packed, exact=layer.exact)).slower

    def keep(self) -> None:
        self._known.keep()
