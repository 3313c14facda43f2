"""Rows of channels, followed through a graph: what a rule takes and gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
from torch import fx

from sparsify.ir.program import Program

Ids = numpy.ndarray


class Row:
    """The channels of one dimension, by number. A parameter's has numbers of its own only once it needs them: one
    that is first met by a row of the same length takes that one's.

    ``elastic``: of no parameter, and of any size (a tensor of zeros, what was expanded): it follows what it meets.
    """

    def __init__(self, walk: Walk, size: int, ids: Ids | None = None, elastic: bool = False) -> None:
        self._walk, self.size, self._ids, self.elastic = walk, size, ids, elastic

    @property
    def fresh(self) -> bool:
        return self._ids is None

    @property
    def ids(self) -> Ids:
        return self.settle()

    def settle(self) -> Ids:
        """Its numbers; one that has met nothing yet gets numbers of its own."""
        if self._ids is None:
            self._ids = self._walk.new_ids(self.size)
        return self._ids

    def take(self, other: Row) -> None:
        self._ids = other.ids

    def made(self, ids: Ids) -> Row:
        return Row(self._walk, len(ids), ids)


# The rows of a tensor's dimensions; None: not a parameter's (batch, sequence, or of size one).
Rows = list[Row | None]


@dataclass
class Walk:
    """One pass over a graph.

    Attributes:
        inside: where a view splits a dimension, whether the innermost part keeps the channels (those inside of heads,
            the same of every head) and not the outermost (heads).
    """

    program: Program
    inside: bool = False
    rows: dict[fx.Node, Any] = field(default_factory=dict)
    # Of tensors whose values are positions in a row: a router's choice of experts. Of several values by their number.
    indexing: dict[Any, Row] = field(default_factory=dict)
    parameters: dict[str, list[Row | None]] = field(default_factory=dict)
    pairs: list[tuple[Ids, Ids]] = field(default_factory=list)
    pins: list[tuple[Ids, str]] = field(default_factory=list)
    # Classes of which an operator takes a mean, a softmax or a choice: with fewer of them it gives others values.
    renormalized: list[Ids] = field(default_factory=list)
    # Classes of which an operator takes some and leaves the others; with True it tells each from each.
    parts: list[tuple[Ids, bool]] = field(default_factory=list)
    without_rule: dict[str, str] = field(default_factory=dict)
    count: int = 0

    def new_ids(self, size: int) -> Ids:
        self.count += size
        return numpy.arange(self.count - size, self.count, dtype=numpy.int64)

    def new_row(self, size: int, elastic: bool = False) -> Row | None:
        return Row(self, size, None, elastic) if size > 1 else None

    def of(self, value: Any) -> Rows:
        """The rows of an operand; a number has none."""
        found: Rows = self.rows[value] if isinstance(value, fx.Node) else []
        return found

    def parameter(self, name: str, shape: Sequence[int]) -> Rows:
        if name not in self.parameters:
            self.parameters[name] = [self.new_row(size) for size in shape]
        return list(self.parameters[name])

    def same(self, one: Row | None, other: Row | None, why: str) -> Row | None:
        """Couple two rows; where only one is a parameter's, it is pinned."""
        if one is None or other is None:
            for row in (one, other):
                self.pin(row, why)
            return None
        if one is other:
            return one
        if one.size != other.size:
            self.pin(one, why)
            self.pin(other, why)
            return None
        if other.fresh:
            other.take(one)
        elif one.fresh:
            one.take(other)
        elif one.ids is not other.ids:
            self.pairs.append((one.ids, other.ids))
        return one

    def pin(self, row: Row | None, why: str) -> None:
        if row is not None:
            self.pins.append((row.ids, why))

    def renormalize(self, row: Row | None) -> None:
        if row is not None:
            self.renormalized.append(row.ids)


RowRule = Callable[[Walk, fx.Node], Any]
