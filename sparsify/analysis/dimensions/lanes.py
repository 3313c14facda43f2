"""Which channels may change places among each other, without another value anywhere outside of them.

A lane is channels of one group (:mod:`sparsify.analysis.dimensions.groups`) that no operator tells apart, read by the
inputs of a linear site as neighbours: the hidden channels of an MLP, of one expert, of the values of one head. If in
every parameter of the group what belongs to channel c comes to lie where that of another lay, the model's function is
the same. Inside of heads the places are those of :func:`~sparsify.analysis.dimensions.groups.dimensions_inside`; where
every parameter of the group is cut into the same heads, or stacked by the same experts, each of these is a lane of its
own, else they move alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy

from sparsify.analysis.dimensions.groups import Dimensions, Group, Member, coupled_dimensions, dimensions_inside
from sparsify.analysis.dimensions.walk import Ids
from sparsify.analysis.linear import LinearSite, find_sites
from sparsify.errors import Refused
from sparsify.ir.program import Program


@dataclass(frozen=True)
class Moving:
    """A dimension of a parameter in which a lane's channels lie. ``places[c, t]``: the t-th position of the c-th."""

    parameter: str
    axis: int
    places: Ids


@dataclass(frozen=True)
class Reading:
    """Inputs of a linear site: ``runs[r]`` are neighbouring positions that hold the lane's channels in their order."""

    site: LinearSite
    runs: Ids


@dataclass(frozen=True)
class Lane:
    """Channels that change places. ``expert``: the one whose matrices these are; None: all that there are."""

    channels: int
    moving: tuple[Moving, ...]
    reading: tuple[Reading, ...]
    expert: int | None = None


@dataclass(frozen=True)
class Lanes:
    """All lanes of one group. ``stacked``: of each parameter the axis that counts experts, where each is a lane."""

    name: str
    lanes: tuple[Lane, ...]
    stacked: Mapping[str, int] = field(default_factory=dict)

    @property
    def parameters(self) -> list[str]:
        return list(dict.fromkeys(moving.parameter for lane in self.lanes for moving in lane.moving))

    @property
    def sites(self) -> list[LinearSite]:
        """Those whose inputs change places."""
        found = {reading.site.parameter: reading.site for lane in self.lanes for reading in lane.reading}
        return list(found.values())


def find_lanes(program: Program, unit: int) -> Iterator[tuple[Group, Lanes | Refused]]:
    """Every group of channels that inputs of a linear site read, with its lanes of at least two times ``unit``
    channels, or why it has none.
    """
    sites: dict[str, LinearSite] = {}
    for site in find_sites(program)[0]:
        sites.setdefault(site.parameter, site)
    whole, inside = coupled_dimensions(program), dimensions_inside(program)
    found: dict[tuple[str, int], tuple[Group, Lanes | Refused]] = {}
    for dimensions in (whole, inside):
        for group in dimensions.groups:
            read = [(m.parameter, m.axis) for m in group.members if _reads(sites, m)]
            if not read or any(isinstance(found.get(at, (0, 0))[1], Lanes) for at in read):
                continue
            lanes = _Finder(sites, group, whole, unit, split=dimensions is inside).lanes()
            for at in read:
                found[at] = group, lanes
    done: list[int] = []
    for group, lanes in found.values():
        if id(lanes) not in done:
            done.append(id(lanes))
            yield group, lanes


def _reads(sites: Mapping[str, LinearSite], member: Member) -> bool:
    site = sites.get(member.parameter)
    return site is not None and site.in_axis == member.axis and site.window is None and not site.grouped


@dataclass(frozen=True)
class _Finder:
    """The lanes of one group. ``split``: whether its channels lie inside of heads."""

    sites: Mapping[str, LinearSite]
    group: Group
    whole: Dimensions
    unit: int
    split: bool

    def lanes(self) -> Lanes | Refused:
        readers = [m for m in self.group.members if _reads(self.sites, m)]
        name = ", ".join(dict.fromkeys(m.parameter.removesuffix(".weight") for m in readers))
        if not len(self.group.free):
            # Without the number of the node, which differs from block to block.
            return Refused(re.sub(r"_\d+\b", "", self.group.reason or "its channels are told apart"), name)
        owners = self._heads() if self.split else None
        stacked = self._experts()
        lanes, why = list[Lane](), "fewer than two groups of channels may change places"
        for head in [None] if owners is None else range(int(max(o.max() for o in owners)) + 1):
            inside = [numpy.ones(len(m.channel), dtype=bool) for m in self.group.members]
            if owners is not None:
                inside = [own == head for own in owners]
            for channels in self._alike(inside):
                lane = self._lane(channels, inside)
                if isinstance(lane, str):
                    why = lane
                elif stacked:
                    experts = range(lane.reading[0].site.experts)
                    lanes += [Lane(lane.channels, lane.moving, lane.reading, expert) for expert in experts]
                else:
                    lanes.append(lane)
        return Lanes(name, tuple(lanes), stacked) if lanes else Refused(why, name)

    def _alike(self, inside: Sequence[Ids]) -> Iterator[Ids]:
        """Free channels that no operator tells apart and that lie equally often in each dimension, set by set."""
        size, free = self.group.channels, self.group.free
        members = self.group.members
        often = [
            numpy.bincount(m.channel[own], minlength=size) for m, own in zip(members, inside, strict=True)
        ]  # fmt: skip
        marks = numpy.stack([self.group.parts, *(n.astype(numpy.uint64) for n in often)])[:, free]
        read = numpy.stack([n for n, m in zip(often, members, strict=True) if _reads(self.sites, m)]).sum(axis=0)[free]
        _, which = numpy.unique(marks, axis=1, return_inverse=True)
        for number in range(int(which.max()) + 1):
            if read[which == number].all():
                yield free[which == number]

    def _lane(self, channels: Ids, inside: Sequence[Ids]) -> Lane | str:
        """Of ``channels``, or why they are none."""
        if len(channels) % self.unit:
            return f"{len(channels)} channels may change places, and are no whole groups of {self.unit}"
        if len(channels) < 2 * self.unit:
            return f"{len(channels)} channels may change places, and are a single group"
        order: Ids | None = None
        reading, rest = list[Reading](), list[tuple[Member, Ids]]()
        for member, own in zip(self.group.members, inside, strict=True):
            at = numpy.flatnonzero(own & numpy.isin(member.channel, channels))
            if not len(at):
                continue
            rest.append((member, at))
            if not _reads(self.sites, member):
                continue
            runs = at.reshape(-1, len(channels))
            if order is None:
                order = member.channel[runs[0]]
            neighbours = (numpy.diff(runs, axis=1) == 1).all() and not (runs[:, 0] % self.unit).any()
            if not neighbours or (member.channel[runs] != order).any() or len(numpy.unique(order)) != len(channels):
                return f"they do not lie in {member.parameter} as whole groups of {self.unit} neighbours"
            reading.append(Reading(self.sites[member.parameter], runs))
        assert order is not None, "some inputs read them"
        number = numpy.empty(self.group.channels, dtype=int)
        number[order] = numpy.arange(len(order))
        moving = []
        for member, at in rest:
            places = _copies(at, number[member.channel[at]], len(order))
            if places is None:
                return f"{member.parameter} holds them in an order that is not one of copies"
            moving.append(Moving(member.parameter, member.axis, places))
        return Lane(len(order), tuple(moving), tuple(reading))

    def _heads(self) -> list[Ids] | None:
        """For each member the head of each of its positions, where all members are cut into the same ones."""
        found: list[Ids] = []
        group = None
        for member in self.group.members:
            for other in self.whole.groups if group is None else [group]:
                same = [m for m in other.members if (m.parameter, m.axis) == (member.parameter, member.axis)]
                if same:
                    group = other
                    found.append(same[0].channel)
                    break
            else:
                return None
        assert group is not None
        free = ~self.group.pinned
        heads: Ids | None = None
        for member, own in zip(self.group.members, found, strict=True):
            at = free[member.channel]
            grid = numpy.zeros((self.group.channels, group.channels), dtype=bool)
            grid[member.channel[at], own[at]] = True
            rows = grid[grid.any(axis=1)]
            # Every channel in every head: else these are no channels inside of heads.
            if not len(rows) or (rows != rows[0]).any() or (heads is not None and (rows[0] != heads).any()):
                return None
            heads = rows[0]
        assert heads is not None
        if group.renormalized or heads.sum() < 2:
            return None
        numbers = numpy.where(heads, numpy.cumsum(heads) - 1, -1)
        return [
            numpy.where(free[m.channel], numbers[own], -1) for m, own in zip(self.group.members, found, strict=True)
        ]

    def _experts(self) -> dict[str, int]:
        """For each parameter the axis that counts experts, where all are stacked by the same ones; else nothing."""
        sites = [self.sites[m.parameter] for m in self.group.members if m.parameter in self.sites]
        first = next(((s.parameter, s.expert_axis) for s in sites if s.expert_axis is not None), None)
        stack = next((g for g in self.whole.groups if first in [(m.parameter, m.axis) for m in g.members]), None)
        if stack is None:
            return {}
        # The e-th of each is the e-th expert's.
        count = numpy.arange(stack.channels)
        axes = {m.parameter: m.axis for m in stack.members if numpy.array_equal(m.channel, count)}
        alike = all(axes.get(m.parameter, m.axis) != m.axis for m in self.group.members)
        return {m.parameter: axes[m.parameter] for m in self.group.members} if alike else {}


def _copies(at: Ids, number: Ids, channels: int) -> Ids | None:
    """``at`` as [channels, copies], where they are whole copies one behind the other (gates, then what they open;
    heads that share values) or interleaved; ``number`` is the channel of each.
    """
    copies = len(at) // channels
    if len(at) != copies * channels:
        return None
    behind, between = number.reshape(copies, channels), number.reshape(channels, copies)
    if (numpy.sort(behind, axis=1) == numpy.arange(channels)).all():
        return numpy.stack(
            [row[numpy.argsort(own)] for row, own in zip(at.reshape(behind.shape), behind, strict=True)], 1
        )
    if (between == between[:, :1]).all():
        return at.reshape(between.shape)[numpy.argsort(between[:, 0])]
    return None
