"""Parameters that a config says are one and of which the file holds two: where they differ they are two.

A LoRA merge with a trained head leaves ``tie_word_embeddings: true`` with an ``lm_head`` of its own in the file.
transformers compares such tensors when it loads them (``PreTrainedModel.tie_weights``, 5.24) and ties only equal ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparsify.errors import CheckpointError
from sparsify.files.checkpoint import Checkpoint
from sparsify.frontend.matching import place
from sparsify.ir.store import TensorStore
from sparsify.ir.weights import tied_names

# Bytes that are compared at once.
_PIECE = 32 << 20


def untie(model: Any, store: TensorStore) -> frozenset[str]:
    """Give a parameter of its own to each tied one whose tensor in ``store`` is another than that of what it is tied
    to, in place; the names of those.

    Raises:
        CheckpointError: two tensors that differ, for modules that are one object.
    """
    aliases = tied_names(model)
    if not aliases:
        return frozenset()
    held = {name: keys[0] for name, keys in place(model, store.names()).renamed.items()}
    apart: set[str] = set()
    # As transformers goes through them: where only the target is stored it stands for its source from there on.
    for target, source in list(getattr(model, "all_tied_weights_keys", {}).items()):
        if target in held and source in held:
            if held[target] != held[source] and not same(store, held[target], held[source], _dtype(model, target)):
                _own(model, target)
                apart.add(target)
        elif target in held:
            held[source] = held[target]
    for name, other in tied_names(model).items():
        one, two = held.get(name), held.get(other)
        if one and two and one != two and not same(store, one, two, _dtype(model, name)):
            raise CheckpointError(
                f"parameter {name}",
                found=f"it is {other} in the model's code, and the folder holds two different tensors, {one} and {two}",
                do="Take the one out that is not meant",
            )
    return frozenset(apart)


def separate(model: Any, names: frozenset[str]) -> None:
    """Do again to another copy of a model what :func:`untie` did."""
    for name in names:
        _own(model, name)


def same(store: TensorStore, one: str, other: str, dtype: torch.dtype) -> bool:
    """Whether two tensors hold the same numbers once they are of ``dtype``, read in pieces where they lie in files."""
    if store.shape(one) != store.shape(other):
        return False
    if not isinstance(store, Checkpoint):
        return torch.equal(store.read(one).to(dtype), store.read(other).to(dtype))
    spans = [(store.span(name), store.dtype(name)) for name in (one, other)]
    widest = max(kind.itemsize for _, kind in spans)
    count, total = _PIECE // widest, store.shape(one).numel()
    with spans[0][0][0].open("rb") as first, spans[1][0][0].open("rb") as second:
        for begin in range(0, total, count):
            parts = []
            for file, ((_, start, _), kind) in zip((first, second), spans, strict=True):
                file.seek(start + begin * kind.itemsize)
                data = bytearray(file.read(min(count, total - begin) * kind.itemsize))
                parts.append((data, kind))
            (left, kind), (right, other_kind) = parts
            if kind == other_kind and left == right:
                continue
            if len(left) // kind.itemsize != len(right) // other_kind.itemsize:
                return False
            numbers = [torch.frombuffer(data, dtype=of).to(dtype) for data, of in parts]
            if not torch.equal(*numbers):
                return False
    return True


def _dtype(model: Any, name: str) -> torch.dtype:
    found: torch.dtype = model.get_parameter_or_buffer(name).dtype
    return found


def _own(model: Any, name: str) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    old = getattr(owner, leaf)
    new = torch.empty_like(old)
    setattr(owner, leaf, nn.Parameter(new, requires_grad=old.requires_grad) if leaf in owner._parameters else new)
    # What else goes by the ties of a model, as its own saving does.
    model.all_tied_weights_keys.pop(name, None)


def config_of(model: Any, untied: frozenset[str], content: dict[str, Any]) -> dict[str, Any]:
    """The ``content`` of a config.json as it is right for ``model``: where nothing is tied any more it says so, for
    whoever does not compare tensors as transformers does."""
    if not untied or model.all_tied_weights_keys:
        return content

    def said(part: dict[str, Any], name: str = "") -> dict[str, Any]:
        inner = {key: said(value, key) if isinstance(value, dict) else value for key, value in part.items()}
        known = name in ("", "text_config", "decoder") or "tie_word_embeddings" in part
        return inner | ({"tie_word_embeddings": False} if known else {})

    return said(content)
