"""Operators by name, whatever the spelling, and their arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

# One product per expert, of tokens sorted by expert: (tokens, a stack of matrices, where each expert's tokens end).
GROUPED_PRODUCTS = frozenset({"grouped_mm", "_grouped_mm", "grouped_mm_fallback"})


def exact_name(node: fx.Node) -> str:
    """``linear`` for ``F.linear``, ``aten.linear.default`` and ``Tensor.linear`` alike; ``add_`` in place."""
    if node.op == "call_method":
        return str(node.target)
    packet = getattr(node.target, "_overloadpacket", None)
    return str(getattr(packet, "__name__", getattr(node.target, "__name__", node.target)))


def operator_name(node: fx.Node) -> str:
    """The same, ``add`` in place or not; ``getitem`` for Python's, ``__and__`` as it is."""
    name = exact_name(node)
    return name if name.startswith("__") else name.rstrip("_")


def shape_of(value: Any) -> Sequence[int]:
    return value.meta["val"].shape if isinstance(value, fx.Node) else ()


def argument(node: fx.Node, place: int, name: str = "", default: Any = None) -> Any:
    """An argument of ``node``, given by place or by name. Whoever asks knows the operator, and so what it is."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def placed(node: fx.Node, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of ``node`` for a run on ``device``: that in the place of every device named, and where a tensor is
    made of numbers alone and no device is named."""
    args, kwargs = fx.node.map_aggregate(
        (node.args, node.kwargs), lambda a: device if isinstance(a, torch.device) else a
    )
    schema = getattr(node.target, "_schema", None)
    takes = {a.name: str(a.type) for a in schema.arguments} if schema is not None else {}
    if "device" in takes and not any("Tensor" in kind for kind in takes.values()):
        kwargs = {**kwargs, "device": device}
    return args, kwargs
