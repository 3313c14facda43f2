"""Rules of operators that compute values one by one, reduce them, or look them up by number."""

from __future__ import annotations

from typing import Any

from torch import fx

from sparsify.analysis.dimensions.rules.common import broadcast, pinned, some
from sparsify.analysis.dimensions.walk import Rows, Walk
from sparsify.ir.operators import argument


def elementwise(walk: Walk, node: fx.Node) -> Rows:
    """Operands aligned at the last dimension; one of size one is repeated."""
    return broadcast(walk, node.all_input_nodes, node)


def passes(walk: Walk, node: fx.Node) -> Rows:
    """One operand's rows, whatever happens to the values."""
    first = node.args[0]
    if first in walk.indexing:
        walk.indexing[node] = walk.indexing[first]
    return list(walk.of(first))


def running(walk: Walk, node: fx.Node) -> Rows:
    """cumsum: along its dimension the channels have an order."""
    row = walk.of(node.args[0])[int(argument(node, 1, "dim"))]
    if row is not None:
        walk.parts.append((row.ids, True))
    return passes(walk, node)


def filled(walk: Walk, node: fx.Node) -> Rows:
    """A tensor of one value: it may have any size, and takes that of what it meets."""
    return [walk.new_row(size, elastic=True) for size in node.meta["val"].shape]


def constant(walk: Walk, node: fx.Node) -> Rows:
    """Values that count positions: no parameter's."""
    return [None] * node.meta["val"].dim()


# Reductions.


def mean(walk: Walk, node: fx.Node) -> Rows:
    """Over channels a mean divides by how many there are."""
    return reduced(walk, node, walk.renormalize)


def total(walk: Walk, node: fx.Node) -> Rows:
    """A sum does not miss a channel that is zero."""
    return reduced(walk, node, lambda row: None)


def extreme(walk: Walk, node: fx.Node) -> Any:
    rows = reduced(walk, node, lambda row: walk.pin(row, f"{node.name} compares its channels"))
    return [rows, list(rows)] if isinstance(node.meta["val"], (tuple, list)) else rows


def reduced(walk: Walk, node: fx.Node, note: Any) -> Rows:
    rows = walk.of(node.args[0])
    asked = argument(node, 1, "dim")
    dims = range(len(rows)) if asked is None else [asked] if isinstance(asked, int) else asked
    gone = {d % len(rows) for d in dims} if rows else set()
    for d in gone:
        note(rows[d])
    # Where keepdim stands among the arguments differs (var has its correction before it); what came out tells.
    value = node.meta["val"]
    kept = (value[0] if isinstance(value, (tuple, list)) else value).dim() == len(rows)
    return [None if i in gone else row for i, row in enumerate(rows) if kept or i not in gone]


def softmax(walk: Walk, node: fx.Node) -> Rows:
    rows = walk.of(node.args[0])
    walk.renormalize(rows[int(argument(node, 1))])
    return list(rows)


def normalized(walk: Walk, node: fx.Node) -> Rows:
    """layer_norm and rms_norm over the last dimensions, with their weights."""
    rows, depth = list(walk.of(node.args[0])), len(argument(node, 1))
    for extra in node.args[2:4]:
        for at, row in enumerate(walk.of(extra), start=-depth):
            rows[at] = walk.same(rows[at], row, f"{node.name} meets it with what is no parameter")
    for row in rows[len(rows) - depth :]:
        walk.renormalize(row)
    return rows


def topk(walk: Walk, node: fx.Node) -> list[Rows]:
    """The largest along a dimension: their values, and positions that a later operator may look up."""
    rows, dim = list(walk.of(node.args[0])), int(argument(node, 2, "dim", -1))
    if (row := rows[dim]) is not None:
        walk.renormalize(row)
        walk.indexing[node, 1] = row
    rows[dim] = None
    return [rows, list(rows)]


def ordered(walk: Walk, node: fx.Node) -> list[Rows]:
    """sort: values keep what they index; positions are of the sorted dimension, which must be no parameter's."""
    rows, dim = list(walk.of(node.args[0])), int(argument(node, 1, "dim", -1))
    walk.pin(rows[dim], f"{node.name} sorts its channels")
    rows[dim] = None
    if node.args[0] in walk.indexing:
        walk.indexing[node, 0] = walk.indexing[node.args[0]]
    return [rows, list(rows)]


def counted(walk: Walk, node: fx.Node) -> Rows:
    """histc over positions in a row: one count for each of its channels."""
    row = walk.indexing.get(node.args[0])
    return [row if row is not None and row.size == node.args[1] else None]


# Look-ups.


def embedding(walk: Walk, node: fx.Node) -> Rows:
    table = walk.of(node.args[0])
    walk.pin(table[0], f"{node.name} looks rows up in it by number")
    return [*walk.of(node.args[1]), table[1]]


def indexed(walk: Walk, node: fx.Node) -> Rows:
    """x[i, :, j]: dimensions that are indexed give way to those of the indices."""
    source, indices = argument(node, 0), list(argument(node, 1))
    rows = walk.of(source)
    held = [i for i, index in enumerate(indices) if index is not None]
    if len(held) == 1 and (row := rows[held[0]]) is not None:
        index = walk.program.constants.get(str(indices[held[0]].target))
        if index is not None and index.dim() == 1 and not index.dtype.is_floating_point:
            return [*rows[: held[0]], some(walk, row, row.ids[index.cpu().numpy()], node), *rows[held[0] + 1 :]]
    for i in held:
        own = walk.indexing.get(indices[i])
        if own is not None:
            # An expert's bias, by the number of the expert that was chosen.
            walk.same(own, rows[i], f"{node.name} looks positions up in it by number")
        else:
            walk.pin(rows[i], f"{node.name} looks positions up in it by number")
    if source in walk.indexing:
        walk.indexing[node] = walk.indexing[source]
    made = broadcast(walk, [indices[i] for i in held], node)
    rest = [row for i, row in enumerate(rows) if i not in held]
    at = held[0] if held and held == list(range(held[0], held[-1] + 1)) else 0
    return [*rest[:at], *made, *rest[at:]]


def put(walk: Walk, node: fx.Node) -> Rows:
    """x[i] = y along the first dimension."""
    rows, indices, values = list(walk.of(argument(node, 0))), list(argument(node, 1)), walk.of(argument(node, 2))
    if len(indices) != 1 or indices[0] is None or len(values) != len(rows):
        return pinned(walk, node)
    walk.pin(rows[0], f"{node.name} looks positions up in it by number")
    return [
        None,
        *(
            walk.same(a, b, f"{node.name} fills it with what is no parameter")
            for a, b in zip(rows[1:], values[1:], strict=True)
        ),
    ]


def gathered(walk: Walk, node: fx.Node) -> Rows:
    """gather: positions of one dimension by number; of a row only by what was chosen from it."""
    rows, dim, index = list(walk.of(argument(node, 0))), int(argument(node, 1)), argument(node, 2)
    if (row := rows[dim]) is not None and walk.indexing.get(index) is not row:
        walk.pin(row, f"{node.name} looks positions up in it by number")
    if index in walk.indexing and node.args[0] in walk.indexing:
        walk.indexing[node] = walk.indexing[node.args[0]]
    rows[dim] = None
    return rows


def scattered(walk: Walk, node: fx.Node) -> Rows:
    rows, dim, index = list(walk.of(argument(node, 0))), int(argument(node, 1)), argument(node, 2)
    own, row = walk.indexing.get(index), rows[dim]
    if own is None:
        walk.pin(row, f"{node.name} writes positions of it by number")
    elif row is not None:
        rows[dim] = walk.same(own, row, f"{node.name} writes positions of it by number")
    return rows


def padded(walk: Walk, node: fx.Node) -> Rows:
    rows, widths = list(walk.of(argument(node, 0))), list(argument(node, 1))
    for number in range(len(widths) // 2):
        if (widths[2 * number] or widths[2 * number + 1]) and rows[-1 - number] is not None:
            walk.pin(rows[-1 - number], f"{node.name} pads it")
            rows[-1 - number] = None
    return rows


def triangle(walk: Walk, node: fx.Node) -> Rows:
    rows = list(walk.of(node.args[0]))
    for at in (-2, -1):
        walk.pin(rows[at], f"{node.name} compares its positions")
        rows[at] = None
    return rows
