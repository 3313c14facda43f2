"""Models whose layers differ in width, which no config.json says: their folder holds the list of what was taken out.

``config.json`` is the dense model's; the model that it builds is given the smaller parameters before anything else
happens. Only modules that read their sizes off their weights run so (linear layers, attention that counts its heads by
division); the graph of the result is compared with the cut one before the folder is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from sparsify.errors import CheckpointError
from sparsify.files.manifest import read_manifest

# (parameter, axis, how many positions stay).
Sizes = Sequence[tuple[str, int, int]]
# What a module calls the size of a dimension of its weight: (attribute, axis), by the axis of nn.Linear and of Conv1D.
_SIZES = {"Linear": (("out_features", 0), ("in_features", 1)), "Conv1D": (("nx", 0), ("nf", 1))}


def sizes_of(folder: Path) -> Sizes | None:
    """The sizes that a folder's list gives; None where its config.json says them.

    Raises:
        CheckpointError: a manifest that is damaged.
    """
    ragged = [record for record in read_manifest(folder).get("structure", []) if record["ragged"]]
    last: dict[tuple[str, int], int] = {}
    for record in ragged:
        for cut in record["cuts"]:
            last |= {(name, axis): len(kept) for name, axis, kept in cut["members"]}
    return [(name, axis, size) for (name, axis), size in last.items()] if ragged else None


def resize(model: nn.Module, sizes: Sizes) -> None:
    """Give ``model``'s parameters their smaller shapes, empty, in place.

    Raises:
        CheckpointError: a parameter that the model has not.
    """
    shapes: dict[str, list[int]] = {}
    for name, axis, size in sizes:
        try:
            shapes.setdefault(name, list(model.get_parameter(name).shape))[axis] = size
        except (AttributeError, IndexError) as error:
            raise CheckpointError(
                f"parameter {name}",
                found="the model of config.json has none of that name and shape",
                do="Do config.json and sparsify.json belong together?",
            ) from error
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        old = getattr(owner, leaf)
        new = nn.Parameter(torch.empty(shape, dtype=old.dtype, device=old.device), requires_grad=old.requires_grad)
        setattr(owner, leaf, new)
        if leaf == "weight":
            for attribute, axis in _SIZES.get(type(owner).__name__, ()):
                if hasattr(owner, attribute):
                    setattr(owner, attribute, shape[axis])
