"""Rules of operators that rearrange: views, transposes, parts, joins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy
from torch import fx

from sparsify.analysis.dimensions.rules.common import broadcast, pinned, some
from sparsify.analysis.dimensions.walk import Row, Rows, Walk
from sparsify.ir.operators import argument, operator_name, shape_of


def view(walk: Walk, node: fx.Node) -> Rows:
    """Dimensions split and merged: read off the two shapes, from left to right."""
    source = node.args[0]
    if source in walk.indexing:
        walk.indexing[node] = walk.indexing[source]
    before, after = list(shape_of(source)), list(node.meta["val"].shape)
    rows, result = walk.of(source), []
    i = j = 0
    while i < len(before) or j < len(after):
        start_i, start_j = i, j
        left, right = (before[i] if i < len(before) else 1), (after[j] if j < len(after) else 1)
        i, j = min(i + 1, len(before)), min(j + 1, len(after))
        while left != right:
            if left < right:
                left, i = left * before[i], i + 1
            else:
                right, j = right * after[j], j + 1
        # Ones belong to neither side; they are passed over where they stand.
        result += _regrouped(walk, rows[start_i:i], before[start_i:i], after[start_j:j], node)
    return result


def _regrouped(walk: Walk, rows: Rows, before: list[int], after: list[int], node: fx.Node) -> Rows:
    if all(row is None for row in rows):
        return [None] * len(after)
    if len(before) == len(after) == 1:
        return rows
    merged = _merged(walk, rows, before, node)
    return [None] * len(after) if merged is None else _split(walk, merged, after)


def _merged(walk: Walk, rows: Rows, sizes: list[int], node: fx.Node) -> Row | None:
    """Several dimensions as one: each position has the channel of the one dimension that has any."""
    known = [i for i, row in enumerate(rows) if row is not None and not row.elastic]
    for row in rows:
        if row is not None and row.elastic:
            # Merged with another its size is built in.
            walk.pin(row, f"{node.name} merges it with others")
    if not known:
        return None
    if len(known) > 1:
        for i in known:
            walk.pin(rows[i], f"{node.name} merges two dimensions of parameters")
        return None
    at = known[0]
    row = rows[at]
    assert row is not None
    outer, inner = math.prod(sizes[:at]), math.prod(sizes[at + 1 :])
    if outer == inner == 1:
        return row
    return row.made(numpy.tile(numpy.repeat(row.ids, inner), outer))


def _split(walk: Walk, row: Row, sizes: list[int]) -> Rows:
    """One dimension as several. The outermost that tells channels apart keeps them, whole: heads, not parts of each;
    or the innermost, alike in every head."""
    result: Rows = [None] * len(sizes)
    if sum(size > 1 for size in sizes) == 1:
        result[next(i for i, size in enumerate(sizes) if size > 1)] = row
        return result
    grid = row.ids.reshape(sizes)
    for at, size in reversed([*enumerate(sizes)]) if walk.inside else enumerate(sizes):
        if size == 1:
            continue
        lines = numpy.moveaxis(grid, at, 0).reshape(size, -1)
        if size > 1 and (lines != lines[:1]).any():
            first = numpy.ascontiguousarray(lines[:, 0])
            if (lines != lines[:, :1]).any():
                walk.pairs.append((numpy.repeat(first, lines.shape[1]), lines.reshape(-1)))
            result[at] = row.made(first)
            return result
    # All one channel: nothing tells positions apart.
    return result


def transpose(walk: Walk, node: fx.Node) -> Rows:
    rows = list(walk.of(node.args[0]))
    a, b = int(argument(node, 1, default=0)), int(argument(node, 2, default=len(rows) - 1))
    rows[a], rows[b] = rows[b], rows[a]
    return rows


def reverse(walk: Walk, node: fx.Node) -> Rows:
    return list(walk.of(node.args[0]))[::-1]


def permute(walk: Walk, node: fx.Node) -> Rows:
    rows = walk.of(node.args[0])
    order: Sequence[int] = argument(node, 1)
    return [rows[i] for i in order]


def unsqueeze(walk: Walk, node: fx.Node) -> Rows:
    rows, at = list(walk.of(argument(node, 0))), int(argument(node, 1))
    rows.insert(at if at >= 0 else at + len(rows) + 1, None)
    return rows


def squeeze(walk: Walk, node: fx.Node) -> Rows:
    rows, shape = walk.of(node.args[0]), shape_of(node.args[0])
    asked = argument(node, 1, "dim")
    dims = range(len(shape)) if asked is None else [asked] if isinstance(asked, int) else asked
    gone = {d % len(shape) for d in dims if shape[d] == 1}
    return [row for i, row in enumerate(rows) if i not in gone]


def expand(walk: Walk, node: fx.Node) -> Rows:
    """What is repeated from one may be repeated any number of times."""
    sizes, before = node.meta["val"].shape, shape_of(node.args[0])
    added = len(sizes) - len(before)
    rows = [None] * added + list(walk.of(node.args[0]))
    grown = [i < added or before[i - added] != size for i, size in enumerate(sizes)]
    return [walk.new_row(n, elastic=True) if g else r for r, n, g in zip(rows, sizes, grown, strict=True)]


def repeat(walk: Walk, node: fx.Node) -> Rows:
    times: Sequence[int] = argument(node, 1)
    own = walk.of(node.args[0])
    rows: Rows = [*[None] * (len(times) - len(own)), *own]
    return [r if r is None or n == 1 else r.made(numpy.tile(r.ids, n)) for r, n in zip(rows, times, strict=True)]


def repeat_interleave(walk: Walk, node: fx.Node) -> Rows:
    rows, times, dim = list(walk.of(node.args[0])), node.args[1], argument(node, 2, "dim")
    if dim is None or not isinstance(times, int):
        return pinned(walk, node)
    if (row := rows[dim]) is not None:
        rows[dim] = row.made(numpy.repeat(row.ids, times))
    return rows


def cut(walk: Walk, node: fx.Node) -> Rows:
    """A slice of one dimension."""
    rows, dim = list(walk.of(node.args[0])), int(argument(node, 1, "dim", 0))
    start, end, step = argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step", 1)
    row = rows[dim]
    if row is not None and node.meta["val"].shape[dim] != row.size:
        rows[dim] = some(walk, row, row.ids[start:end:step], node)
    return rows


def select(walk: Walk, node: fx.Node) -> Rows:
    rows, dim, index = list(walk.of(argument(node, 0))), int(argument(node, 1)), int(argument(node, 2))
    if (row := rows.pop(dim)) is not None:
        some(walk, row, row.ids[index : index + 1 or None], node)
    return rows


def pieces(walk: Walk, node: fx.Node) -> list[Rows]:
    """chunk, split, split_with_sizes, unbind: a dimension in parts, as their shapes say."""
    rows, first = walk.of(node.args[0]), node.meta["val"][0].shape
    last = 0 if operator_name(node) == "unbind" else 2
    dim = int(argument(node, max(1, last), "dim", 0)) % len(rows)
    if operator_name(node) == "unbind":
        walk.pin(rows[dim], f"{node.name} takes single positions of it")
        return [[r for i, r in enumerate(rows) if i != dim] for _ in node.meta["val"]]
    found, at = [], 0
    for val in node.meta["val"]:
        size, row = val.shape[dim], rows[dim]
        part = None if row is None else some(walk, row, row.ids[at : at + size], node)
        found.append([*rows[:dim], part, *rows[dim + 1 :]])
        at += size
    assert len(first) == len(rows)
    return found


def item(walk: Walk, node: fx.Node) -> Any:
    source, index = argument(node, 0), argument(node, 1)
    if (source, index) in walk.indexing:
        walk.indexing[node] = walk.indexing[source, index]
    rows = walk.rows[source]
    return list(rows[index]) if isinstance(index, int) else pinned(walk, node)


def joined(walk: Walk, node: fx.Node) -> Rows:
    """cat: the dimension's rows one behind the other, the other dimensions the same."""
    given: Sequence[fx.Node] = argument(node, 0)
    # torch passes over an empty tensor of one dimension (a cache that holds nothing yet), whatever the others have.
    parts = [part for part in given if tuple(shape_of(part)) != (0,)] or given
    dim = int(argument(node, 1, "dim", 0)) % len(shape_of(parts[0]))
    result: Rows = []
    for at in range(len(shape_of(parts[0]))):
        rows = [walk.of(p)[at] for p in parts]
        if at == dim:
            known = [row for row in rows if row is not None]
            if len(known) == len(rows):
                result.append(known[0].made(numpy.concatenate([row.ids for row in known])))
                continue
            for row in rows:
                walk.pin(row, f"{node.name} joins it with what is no parameter")
            result.append(None)
            continue
        found = rows[0]
        for row in rows[1:]:
            found = walk.same(found, row, f"{node.name} meets it with what is no parameter")
        result.append(found)
    return result


def stacked(walk: Walk, node: fx.Node) -> Rows:
    parts: Sequence[fx.Node] = argument(node, 0)
    rows = broadcast(walk, parts, node)
    at = int(argument(node, 1, "dim", 0))
    rows.insert(at if at >= 0 else at + len(rows) + 1, None)
    return rows
