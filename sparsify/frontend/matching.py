"""Which tensor of a checkpoint, or of a module, is which parameter of the model."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsify.errors import CheckpointError, near
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


def weights_of_checkpoint(model: nn.Module, store: TensorStore) -> Weights:
    """Match the tensors of ``store`` to the parameters of a ``transformers`` model on the meta device.

    Raises:
        CheckpointError: a tensor that the config has no place for, a parameter without a tensor, or a shape that
            disagrees.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    aliases = tied_names(model)
    wanted = model.state_dict()
    prefix = getattr(model, "base_model_prefix", "")

    renamed: dict[str, str] = {}
    groups: dict[str, Conversion] = {}
    unexpected = []
    for key in sorted(store.names(), key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=wanted)
        if name not in wanted:
            unexpected.append(key)
        elif pattern is None:
            renamed[aliases.get(name, name)] = key
        else:
            group = groups.setdefault(name, Conversion(by_pattern[pattern], [], [name]))
            group.sources.append((key, pattern))

    shapes = {name: store.shape(key) for name, key in renamed.items()}
    converted: dict[str, Conversion] = {}
    for conversion in groups.values():
        dry = {key: torch.empty(store.shape(key), device="meta") for key, _ in conversion.sources}
        result = run_converter(conversion, dry, model)
        conversion.targets = sorted(result, key=lambda name: name != conversion.targets[0])
        for name, tensor in result.items():
            name = aliases.get(name, name)
            converted[name], shapes[name] = conversion, tensor.shape
            conversion.shapes[name] = tensor.shape
    _check_complete(model, wanted, shapes, unexpected, aliases, len(list(store.names())))
    return Weights(store, renamed, converted, aliases, model, [t for t in transforms if t.was_used()])


def _check_complete(
    model: nn.Module,
    wanted: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    unexpected: list[str],
    aliases: Mapping[str, str],
    total: int,
) -> None:
    allowed = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []), r"rotary_emb\.inv_freq"]
    unexpected = [key for key in unexpected if not any(re.search(pattern, key) for pattern in allowed)]
    optional = list(getattr(model, "_keys_to_ignore_on_load_missing", None) or [])
    missing = [
        name
        for name in wanted
        if aliases.get(name, name) not in shapes and not any(re.search(pattern, name) for pattern in optional)
    ]
    kind = type(model).__name__
    if unexpected:
        raise CheckpointError(
            f"weights for {kind}",
            found=f"{len(unexpected)} of {total} tensors have no place in the config's model, first {unexpected[0]}",
            do=f"Does config.json belong to these weights? {near(unexpected[0], wanted)}",
        )
    if missing:
        raise CheckpointError(
            f"weights for {kind}",
            found=f"{len(missing)} parameters have no tensor in the folder, first {missing[0]}",
            do="Does config.json belong to these weights, and is every shard there?",
        )
    for name, shape in shapes.items():
        if wanted[name].shape != shape:
            raise CheckpointError(
                f"tensor {name}",
                found=f"shape {tuple(shape)} in the folder, {tuple(wanted[name].shape)} by config.json",
                do="Does config.json belong to these weights?",
            )
