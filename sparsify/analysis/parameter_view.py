"""A parameter seen through what only turns it, copies it or multiplies it by a number."""

from __future__ import annotations

import torch
from torch import fx

from sparsify.ir.operators import argument
from sparsify.ir.program import Program

aten = torch.ops.aten

# A permutation of axes or a copy: a parameter seen through these is still that parameter.
_SAME = {aten.alias, aten.detach, aten.to, aten.contiguous, aten.clone, aten._to_copy}
_VIEWS = {aten.view, aten.reshape, aten._unsafe_view, aten.unflatten}
# By a number: a parameter that is scaled as a whole is pruned as if it were not.
_SCALED = {aten.mul, aten.div}


def through_views(program: Program, node: object) -> tuple[fx.Node, list[int]] | None:
    """The ``get_attr`` behind ``node`` and, for each axis of ``node``, that of the parameter; None if computed.
    Of an axis that a view splits into groups the outer part is ``~axis`` and the inner one ``axis``."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "get_attr":
        return (node, list(range(node.meta["val"].dim()))) if program.parameter(node) else None
    packet = getattr(node.target, "_overloadpacket", None)
    inner = through_views(program, node.args[0]) if node.args else None
    if inner is None:
        return None
    source, axes = inner
    if packet in _SAME or (packet in _SCALED and not isinstance(node.args[1], fx.Node)):
        return inner
    if packet in (aten.t, aten.numpy_T):
        return source, axes[::-1]
    if packet is aten.transpose:
        a, b = int(argument(node, 1)), int(argument(node, 2))
        axes[a], axes[b] = axes[b], axes[a]
        return source, axes
    if packet is aten.permute:
        return source, [axes[i] for i in argument(node, 1)]
    if packet in _VIEWS:
        return _split(source, axes, node)
    return None


def _split(source: fx.Node, axes: list[int], node: fx.Node) -> tuple[fx.Node, list[int]] | None:
    """The same of a view that does nothing, or splits one axis into groups and touches no other."""
    before, after = list(node.args[0].meta["val"].shape), list(node.meta["val"].shape)  # type: ignore[union-attr]
    if before == after:
        return source, axes
    for at, axis in enumerate(axes):
        split = len(after) == len(before) + 1 and before[:at] + before[at + 1 :] == after[:at] + after[at + 2 :]
        if split and axis >= 0 and ~axis not in axes and after[at] > 1:
            return source, [*axes[:at], ~axis, *axes[at:]]
    return None


def is_scaled(program: Program, node: fx.Node) -> bool:
    """Whether a number stands between the product and a parameter of it."""
    todo = [a for a in node.all_input_nodes if through_views(program, a)]
    while todo:
        seen = todo.pop()
        if getattr(seen.target, "_overloadpacket", None) in _SCALED:
            return True
        todo += seen.all_input_nodes
    return False
