"""Rules of whole functions that loop over a sequence (see :mod:`sparsify.frontend.tracing.recurrences`)."""

from __future__ import annotations

import inspect
from typing import Any

import numpy
from torch import fx

from sparsify.analysis.dimensions.rules.common import pinned
from sparsify.analysis.dimensions.walk import Row, Rows, Walk
from sparsify.ir.operators import shape_of


def delta_rule(walk: Walk, node: fx.Node) -> Any:
    """query and key [batch, tokens, heads, keys], value [batch, tokens, value heads, values], g and beta [batch,
    tokens, value heads, …] → as value. A query head serves several value heads that lie side by side."""
    given = _arguments(node)
    if _state(given):
        return _not_followed(walk, node)
    query, key, value = (walk.of(given[name]) for name in ("query", "key", "value"))
    fewer, heads = shape_of(given["query"])[2], shape_of(given["value"])[2]
    row = _same(walk, node, query[2], key[2])
    if row is not None and fewer != heads:
        row = row.made(numpy.repeat(row.ids, heads // fewer))
    row = _same(walk, node, value[2], row, size=heads)
    for name in ("g", "beta"):
        row = _same(walk, node, row, walk.of(given[name])[2], size=heads)
    for keys in (query[3], key[3], walk.of(given["g"])[3] if len(walk.of(given["g"])) > 3 else None):
        walk.pin(keys, f"{node.name} divides by how many there are")
    return _given(node, [value[0], value[1], row, value[3]])


def selective_scan(walk: Walk, node: fx.Node) -> Any:
    """hidden_states, dt and z [batch, channels, tokens], A [channels, states], B and C [batch, states, tokens], D and
    delta_bias [channels] → as hidden_states; summed over states."""
    given = _arguments(node)
    hidden = walk.of(given["hidden_states"])
    channels, states = hidden[1], walk.of(given["A"])[1]
    size = shape_of(given["A"])
    for name, at in (("dt", 1), ("z", 1), ("A", 0), ("D", 0), ("delta_bias", 0)):
        if isinstance(given.get(name), fx.Node):
            channels = _same(walk, node, channels, walk.of(given[name])[at], size=size[0])
    for name in ("B", "C"):
        states = _same(walk, node, states, walk.of(given[name])[1], size=size[1])
    return _given(node, [hidden[0], channels, hidden[2]])


def decayed_attention(walk: Walk, node: fx.Node) -> Any:
    """RWKV: time_decay and time_first [channels], key and value [batch, tokens, channels] → as key."""
    given = _arguments(node)
    if _state(given):
        return _not_followed(walk, node)
    key = walk.of(given["key"])
    row = key[2]
    for name in ("value", "time_decay", "time_first"):
        row = _same(walk, node, row, walk.of(given[name])[-1], size=shape_of(given["key"])[2])
    return _given(node, [key[0], key[1], row])


def _arguments(node: fx.Node) -> dict[str, Any]:
    found = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    return dict(found.arguments)


def _state(given: dict[str, Any]) -> bool:
    """Whether it begins with what an earlier call left."""
    return any(given.get(name) is not None for name in ("state", "initial_state"))


def _same(walk: Walk, node: fx.Node, one: Row | None, other: Row | None, size: int = 2) -> Row | None:
    return walk.same(one, other, f"{node.name} meets it with what is no parameter") if size > 1 else None


def _given(node: fx.Node, rows: Rows) -> Any:
    """``rows`` of the first value; those of a last state, which nobody reads, of none."""
    val: Any = node.meta["val"]
    if not isinstance(val, (tuple, list)):
        return rows
    return [rows, *([] if part is None else [None] * part.dim() for part in val[1:])]


def _not_followed(walk: Walk, node: fx.Node) -> Any:
    val: Any = node.meta["val"]
    if not isinstance(val, (tuple, list)):
        return pinned(walk, node)
    for operand in node.all_input_nodes:
        for row in walk.of(operand):
            walk.pin(row, f"{node.name} is used in a way that has no rule")
    return [[] if part is None else [None] * part.dim() for part in val]
