"""Operators by name, whatever the spelling, and their arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
