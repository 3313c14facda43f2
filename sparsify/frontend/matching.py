"""Which tensor of a checkpoint, or of a module, is which parameter of the model."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sparsify.errors import CheckpointError
from sparsify.frontend.complete import check_complete
from sparsify.ir.store import MemoryStore, TensorStore
from sparsify.ir.weights import Conversion, Weights, run_converter, tied_names


def weights_of_module(model: nn.Module) -> Weights:
    """The parameters of a module in memory, whose tensors are read and never changed."""
    aliases = tied_names(model)
    own = {n: p.detach() for n, p in model.named_parameters() if n not in aliases}
    # What no checkpoint of it would hold (rotary frequencies) is a constant of the graph.
    unsaved = {f"{p}.{n}" if p else n for p, m in model.named_modules() for n in m._non_persistent_buffers_set}
    own |= {n: b.detach() for n, b in model.named_buffers() if n not in aliases and n not in unsaved}
    return Weights(MemoryStore(MemoryStore(None, own)), {name: name for name in own}, aliases=aliases)


@dataclass
class Placement:
    """Where the tensors of a checkpoint belong by their names.

    Attributes:
        renamed: parameter name to the tensors that are it; there are several only in a file that says one thing twice.
        groups: parameter name to the conversion that makes it. unknown: tensors for which the model has no place.
        exact: how many have the very name of their parameter. transforms: what of transformers' mapping was used.
    """

    renamed: dict[str, list[str]] = field(default_factory=dict)
    groups: dict[str, Conversion] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    exact: int = 0
    transforms: list[Any] = field(default_factory=list)


def place(model: nn.Module, names: Iterable[str]) -> Placement:
    """Say by transformers' own renamings which parameter of ``model`` each of ``names`` is, ties aside."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    wanted = model.state_dict()
    prefix = getattr(model, "base_model_prefix", "")
    found = Placement()
    for key in sorted(names, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=wanted)
        if name not in wanted:
            found.unknown.append(key)
        elif pattern is None:
            found.renamed.setdefault(name, []).append(key)
            found.exact += name == key
        else:
            group = found.groups.setdefault(name, Conversion(by_pattern[pattern], [], [name]))
            group.sources.append((key, pattern))
    found.transforms = [t for t in transforms if t.was_used()]
    return found


def weights_of_checkpoint(
    model: nn.Module, store: TensorStore, *, untied: Collection[str] = (), strict: bool = False
) -> Weights:
    """Match the tensors of ``store`` to the parameters of a ``transformers`` model on the meta device.

    Of parameters that are tied to each other only those that hold the same numbers are one:
    :func:`sparsify.frontend.ties.untie` has seen to that.

    Args:
        untied: what it said. strict: refuse tensors that the model has no place for.

    Raises:
        CheckpointError: a parameter without a tensor, a shape that disagrees, two tensors for one parameter; tensors
            that show the config to be another model's; with ``strict`` any that the config has no place for.
    """
    placed = place(model, store.names())
    aliases, wanted = tied_names(model), model.state_dict()
    renamed: dict[str, str] = {}
    twins: dict[str, list[str]] = {}
    shapes: dict[str, torch.Size] = {}
    own: dict[str, str] = {}
    for name, keys in placed.renamed.items():
        if len(keys) > 1:
            raise CheckpointError(
                f"parameter {name}",
                found=f"two tensors in the folder are it, {keys[0]} and {keys[1]}",
                do="Take one of them out",
            )
        shapes[name] = store.shape(keys[0])
        own[name] = keys[0]
    for name, key in own.items():
        canonical = aliases.get(name, name)
        # Its own tensor before that of what is tied to it; the others say the same.
        if renamed.setdefault(canonical, own.get(canonical, key)) != key:
            twins.setdefault(canonical, []).append(key)
    converted: dict[str, Conversion] = {}
    for conversion in placed.groups.values():
        dry = {key: torch.empty(store.shape(key), device="meta") for key, _ in conversion.sources}
        result = run_converter(conversion, dry, model)
        conversion.targets = sorted(result, key=lambda name: name != conversion.targets[0])
        for name, tensor in result.items():
            name = aliases.get(name, name)
            converted[name], shapes[name] = conversion, tensor.shape
            conversion.shapes[name] = tensor.shape
    check_complete(model, wanted, shapes, placed.unknown, aliases, list(store.names()), strict)
    weights = Weights(store, renamed, converted, aliases, model, placed.transforms, twins)
    weights.unknown, weights.untied = tuple(placed.unknown), frozenset(untied)
    return weights
