"""Which dimensions of a model's parameters must shrink together, read off its graph.

Every dimension of every tensor is a row of channels; a channel is known by a number. A parameter's dimension begins
with numbers of its own, and each operator says what it does to its operands' rows
(:mod:`sparsify.analysis.dimensions.rules.table`): passes them on, cuts, joins, repeats or splits them, or needs two of
them to be the same. What must be the same is one class: the channels of a class are removed together or not at all. A
class is pinned where something in the graph has the size of the dimension built in and is no parameter (rotary
frequencies, a vocabulary), or where an operator has no rule.

Nothing here knows a model: heads are found because a ``view`` splits them, and a query head belongs to its key-value
head because an ``expand`` repeats that one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import networkx
import numpy
from torch import SymInt, Tensor, fx

from sparsify.analysis.dimensions.rules.table import RULES
from sparsify.analysis.dimensions.walk import Ids, Row, Walk
from sparsify.ir.operators import operator_name
from sparsify.ir.program import Program


@dataclass(frozen=True)
class Member:
    """One dimension of one parameter in a group. ``channel[i]``: the channel of the group that position i belongs
    to.
    """

    parameter: str
    axis: int
    channel: Ids

    def positions(self, channels: Sequence[int]) -> Ids:
        """Of all of ``channels``."""
        return numpy.flatnonzero(numpy.isin(self.channel, numpy.asarray(channels)))


@dataclass(frozen=True)
class Group:
    """Dimensions that shrink together.

    Attributes:
        members: every one of them, in the order in which the graph reads them.
        channels: how many there are to remove, one by one. pinned: for each, whether it must stay.
        reason: why the pinned ones must.
        renormalized: whether a mean, a norm, a softmax or a choice is taken over them, so that a model without some
            gives other values than one where these are zero.
        parts: for each channel a number. Of one number are those that no operator tells apart: a slice takes all of
            them or none.
    """

    members: tuple[Member, ...]
    channels: int
    pinned: Ids
    reason: str | None
    renormalized: bool
    parts: Ids

    @property
    def free(self) -> Ids:
        """Channels that may be removed."""
        return numpy.flatnonzero(~self.pinned)

    def widths(self) -> set[int]:
        """How many positions of a member one channel takes."""
        found: set[int] = set()
        for member in self.members:
            found |= set(numpy.bincount(member.channel, minlength=self.channels)[self.free].tolist()) - {0}
        return found


@dataclass(frozen=True)
class Dimensions:
    """The coupled dimensions of a program.

    Attributes:
        groups: those with a channel that may be removed, then those that are pinned.
        rows: for every node the rows of its value, as numbers of classes (None: no parameter's dimension).
        group_of: for every class (group, channel). without_rule: operators that have none, and the node that met one.
    """

    groups: tuple[Group, ...]
    rows: dict[fx.Node, Any]
    group_of: tuple[Ids, Ids]
    without_rule: dict[str, str]

    @property
    def prunable(self) -> list[Group]:
        return [group for group in self.groups if len(group.free)]


def coupled_dimensions(program: Program) -> Dimensions:
    """Every group of dimensions of ``program``'s parameters that must shrink together. Found once a graph.

    An operator without a rule pins what it reads and is named; the others are followed exactly. Linear in the nodes.
    """
    return program.fact(_coupled)


def dimensions_inside(program: Program) -> Dimensions:
    """The same where a channel is one place inside of every head, in the place of a whole head. Found once a graph.

    What is pinned here cannot change places in all heads alike; nothing may be removed by it.
    """
    return program.fact(_inside)


def _inside(program: Program) -> Dimensions:
    return _coupled(program, inside=True)


def _coupled(program: Program, inside: bool = False) -> Dimensions:
    walk = Walk(program, inside)
    for node in program.graph.nodes:
        walk.rows[node] = _rows(walk, node)
    return _resolve(walk)


def _rows(walk: Walk, node: fx.Node) -> Any:
    val: Any = node.meta.get("val")
    if node.op == "get_attr":
        name = walk.program.parameter(node)
        if name is None:
            return [None] * val.dim()
        return walk.parameter(walk.program.weights.canonical(name), val.shape)
    if node.op == "output":
        for operand in node.all_input_nodes:
            for row in _flat(walk.rows[operand]):
                walk.pin(row, "the model returns it")
    if node.op != "call_function":
        return [None] * val.dim() if isinstance(val, Tensor) else []
    name, reason = operator_name(node), f"{node.name} has a size that only a run tells"
    if all(_is_told(n.meta.get("val")) for n in (node, *node.all_input_nodes)):
        rule = RULES.get(name)
        if rule is not None:
            return rule(walk, node)
        walk.without_rule.setdefault(name, node.name)
        reason = f"{name} has no rule"
    for operand in node.all_input_nodes:
        for row in _flat(walk.rows[operand]):
            walk.pin(row, reason)
    return _nothing(val)


def _is_told(val: Any) -> bool:
    """Whether every size of a value is a number: none depends on what is in an input (how large an image is)."""
    if isinstance(val, Tensor):
        return all(isinstance(size, int) for size in val.shape)
    return not isinstance(val, SymInt) and all(map(_is_told, val if isinstance(val, (tuple, list)) else ()))


def _nothing(val: Any) -> Any:
    if isinstance(val, Tensor):
        return [None] * val.dim()
    return [_nothing(v) for v in val] if isinstance(val, (tuple, list)) else []


def _flat(rows: Any) -> Iterator[Row | None]:
    for row in rows:
        if isinstance(row, list):
            yield from _flat(row)
        else:
            yield row


def _resolve(walk: Walk) -> Dimensions:
    for row in _flat([*walk.parameters.values(), *walk.rows.values()]):
        if row is not None:
            row.settle()
    label = _classes(walk.count, walk.pairs)
    pinned = numpy.zeros(walk.count, dtype=bool)
    why: dict[int, str] = {}
    for ids, reason in walk.pins:
        found = label[ids]
        if not len(found):  # a dimension of no channels
            continue
        pinned[found] = True
        why.setdefault(int(found[0]), reason)
    renormalized = numpy.zeros(walk.count, dtype=bool)
    for ids in walk.renormalized:
        renormalized[label[ids]] = True
    parts = numpy.zeros(walk.count, dtype=numpy.uint64)
    drawn = numpy.random.default_rng(0)
    for ids, each in walk.parts:
        # A sum of random numbers says which parts a class is in.
        found = numpy.unique(label[ids])
        parts[found] += drawn.integers(1 << 63, size=len(found) if each else 1, dtype=numpy.uint64)
    axes = [
        (name, axis, label[row.ids])
        for name, rows in walk.parameters.items()
        for axis, row in enumerate(rows)
        if row is not None
    ]
    groups: list[Group] = []
    group_of, channel_of = numpy.full(walk.count, -1), numpy.full(walk.count, -1)
    for component in _components(walk.count, [ids for _, _, ids in axes]):
        own = numpy.unique(numpy.concatenate([axes[i][2] for i in component]))
        members = tuple(Member(axes[i][0], axes[i][1], numpy.searchsorted(own, axes[i][2])) for i in component)
        first = next((why[c] for c in own.tolist() if c in why), None) if pinned[own].any() else None
        groups.append(Group(members, len(own), pinned[own], first, bool(renormalized[own].any()), parts[own]))
    order = sorted(range(len(groups)), key=lambda i: not len(groups[i].free))
    groups = [groups[i] for i in order]
    for number, group in enumerate(groups):
        for member in group.members:
            row = walk.parameters[member.parameter][member.axis]
            assert row is not None, "a member is a dimension with channels"
            ids = label[row.ids]
            group_of[ids], channel_of[ids] = number, member.channel
    rows = {node: _as_classes(rows, label) for node, rows in walk.rows.items()}
    return Dimensions(tuple(groups), rows, (group_of, channel_of), walk.without_rule)


def _classes(count: int, pairs: list[tuple[Ids, Ids]]) -> Ids:
    """The least number of each number's class: what is smaller flows over every pair until nothing changes."""
    label = numpy.arange(count)
    if not pairs:
        return label
    left, right = (numpy.concatenate(side) for side in zip(*pairs, strict=True))
    while True:
        least = numpy.minimum(label[left], label[right])
        before = label.copy()
        for side in (left, right):
            # Of the number itself, and of the one that it was last known by.
            numpy.minimum.at(label, label[side], least)
            numpy.minimum.at(label, side, least)
        label = label[label]
        if numpy.array_equal(label, before):
            return label


def _components(count: int, axes: list[Ids]) -> list[list[int]]:
    """Dimensions that share a class, directly or through others."""
    graph: networkx.Graph = networkx.Graph()
    graph.add_nodes_from(range(len(axes)))
    first = numpy.full(count, -1)
    for number, ids in enumerate(axes):
        seen = first[ids]
        graph.add_edges_from((number, int(other)) for other in numpy.unique(seen[seen >= 0]))
        first[ids[seen < 0]] = number
    return [sorted(component) for component in networkx.connected_components(graph)]


def _as_classes(rows: Any, label: Ids) -> Any:
    return [
        _as_classes(row, label) if isinstance(row, list) else None if row is None else label[row.ids] for row in rows
    ]
