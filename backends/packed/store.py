"""A packed folder read as if it were dense: each parameter is unpacked when it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.backends.packed.config import sites_of, without_packing
from sparsify.backends.packed.format import PackedSite
from sparsify.errors import CheckpointError
from sparsify.files.checkpoint import Checkpoint
from sparsify.files.ledger import Ledger
from sparsify.files.reading import kind_at, read_json
from sparsify.runtime.codes import row_starts
from sparsify.runtime.cpu.unpacking import unpacked
from sparsify.runtime.layout import Packed
from sparsify.runtime.soundness import check


class PackedStore:
    """The tensors of a packed folder under the names of the model's parameters, dense.

    Args:
        ledger: what the files are held against; see :class:`Checkpoint`.

    Raises:
        CheckpointError: a tensor that is missing, of another shape or dtype than config.json says, or damaged.
    """

    def __init__(self, folder: Path, sites: Mapping[str, PackedSite], ledger: Ledger | None = None) -> None:
        self.checkpoint = Checkpoint(folder, ledger=ledger)
        self.sites = dict(sites)
        names = set(self.checkpoint.names())
        check_tensors(
            self.sites, {n: (tuple(self.checkpoint.shape(n)), self.checkpoint.dtype(n)) for n in names}, str(folder)
        )
        self._beside = {name + part for name, site in self.sites.items() for part in site.parts if part}

    def names(self) -> Iterable[str]:
        return [name for name in self.checkpoint.names() if name not in self._beside]

    def shape(self, name: str) -> torch.Size:
        return self.sites[name].shape if name in self.sites else self.checkpoint.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.checkpoint.dtype(name)

    def packed(self, name: str) -> Packed:
        """The packed matrix of parameter ``name``, checked."""
        packed = self.sites[name].packed(lambda part: self.checkpoint.read(name + part))
        check(name, packed)
        return packed

    def read(self, name: str) -> Tensor:
        if name not in self.sites:
            return self.checkpoint.read(name)
        packed = self.packed(name)
        starts = row_starts(packed.codes, packed.bits) if packed.layout == "bitmask" else None
        return self.sites[name].parameter(unpacked(packed, starts))

    def dense_config(self, config: dict[str, Any]) -> dict[str, Any]:
        return without_packing(config)

    def write(self, name: str, tensor: Tensor) -> None:
        raise CheckpointError(f"writing {name}", found="a packed folder", do="Write to an output")


def open_packed(folder: Path, ledger: Ledger) -> PackedStore | None:
    """The store of a packed folder, whose tensors are held against ``ledger``; None where config.json says that it is
    not one.

    Raises:
        CheckpointError: a packed folder that is damaged, or of a newer format.
    """
    if kind_at(folder / "config.json") is None:
        return None  # whoever builds a model of it says so
    sites = sites_of(read_json(folder / "config.json"), str(folder))
    return None if sites is None else PackedStore(folder, sites, ledger)


def check_tensors(
    sites: Mapping[str, PackedSite], tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], where: str
) -> None:
    """Check that ``tensors``, (shape, dtype) by name, are those that ``sites`` need.

    Raises:
        CheckpointError: names the tensor, what it is and what it should be.
    """
    for name, site in sites.items():
        for part, (shape, kind) in site.parts.items():
            tensor = name + part
            if tensor not in tensors:
                raise CheckpointError(
                    f"packed tensor {tensor}", found=f"{where} does not hold it", do="Fetch the folder again"
                )
            found, dtype = tensors[tensor]
            if found != shape or (dtype != kind if kind is not None else not dtype.is_floating_point):
                raise CheckpointError(
                    f"packed tensor {tensor}",
                    found=f"{list(found)} of {dtype} where {list(shape)} of {kind or 'a floating dtype'} belong",
                    do="config.json and the weights do not belong together: fetch the folder again",
                )
