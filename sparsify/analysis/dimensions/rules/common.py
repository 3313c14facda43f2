"""What rules share: names, shapes and arguments of operators, and rows that meet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from sparsify.analysis.dimensions.walk import Row, Rows, Walk
from sparsify.ir.operators import shape_of


def broadcast(walk: Walk, operands: Sequence[fx.Node], node: fx.Node, drop: int = 0) -> Rows:
    """The rows of operands that are broadcast, their last ``drop`` dimensions left out."""
    parts = [(list(shape_of(o))[: len(shape_of(o)) - drop], walk.of(o)[: len(shape_of(o)) - drop]) for o in operands]
    depth = max((len(shape) for shape, _ in parts), default=0)
    result: Rows = []
    for at in range(-depth, 0):
        rows = [rows[at] for shape, rows in parts if len(shape) >= -at and shape[at] != 1]
        found = rows[0] if rows else None
        for row in rows[1:]:
            found = walk.same(found, row, f"{node.name} meets it with what is no parameter")
        result.append(found)
    return result


def some(walk: Walk, row: Row, ids: Any, node: fx.Node) -> Row | None:
    """Some positions of a row; a single one is pinned, since a dimension of size one cannot lose it."""
    part = row.made(ids)
    walk.parts.append((ids, False))
    if len(ids) != 1:
        return part
    walk.pin(part, f"{node.name} takes one position of it")
    return None


def pinned(walk: Walk, node: fx.Node) -> Any:
    """A use of an operator that is not followed."""
    for operand in node.all_input_nodes:
        for row in walk.of(operand):
            walk.pin(row, f"{node.name} is used in a way that has no rule")
    return [None] * node.meta["val"].dim()
