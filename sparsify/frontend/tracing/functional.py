"""In-place operators on a model's own tensors, made to give new ones.

A model may write to its parameters while it runs (RWKV halves them every few layers, once). A graph runs many times,
and what it reads is the user's: a program computes a new value instead.
"""

from __future__ import annotations

import torch
from torch import fx

from sparsify.errors import TraceError
from sparsify.ir.operators import exact_name


def without_writes(graph: fx.Graph) -> None:
    """Replace each operator of ``graph`` that writes to a ``get_attr`` by the one that computes the same anew.

    Raises:
        TraceError: there is no such operator.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.is_mutable:
            continue
        first = node.args[0] if node.args else None
        if not isinstance(first, fx.Node) or first.op != "get_attr":
            continue
        node.target = _functional(node)
        # Whoever reads the tensor afterwards reads what was made of it.
        for user in list(first.users):
            if order[user] > order[node]:
                user.replace_input_with(first, node)


def _functional(node: fx.Node) -> object:
    """``aten.div.Tensor`` of ``aten.div_.Tensor``."""
    packet = getattr(torch.ops.aten, exact_name(node).removesuffix("_"), None)
    found = getattr(packet, node.target._overloadname, None)  # type: ignore[union-attr]
    schema = getattr(found, "_schema", None)
    if schema is None or schema.is_mutable or not exact_name(node).endswith("_"):
        raise TraceError(
            f"capturing {node.format_node()}",
            found=f"an operator that writes to the model's own tensor {node.args[0]}, and none that does not",
            do="Report the model",
        )
    return found
