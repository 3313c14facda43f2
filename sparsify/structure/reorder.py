"""Runs a channel pass over a program: which groups it is for, what their inputs measure, and each group in its new
order.

The inputs are measured in one forward of the model as it is, a number for each channel; then one group after the other
is read, ordered and written; several processes order groups that have nothing in common at the same time. Reordered are
only channels inside of one block, so that what goes from block to block is the same as before.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sparsify.analysis.dimensions.lanes import Lane, Lanes, find_lanes
from sparsify.analysis.linear import block_of, find_sites
from sparsify.calibration.measuring import Measuring
from sparsify.context import ChannelResult, Context, Progress
from sparsify.errors import Refused, SpecError
from sparsify.host import within_memory
from sparsify.ir.program import Program
from sparsify.ir.weights import Weights
from sparsify.journal.journal import NOT_KEPT, Kept
from sparsify.method.channel_pass import ChannelPass
from sparsify.method.selection import nm_most
from sparsify.method.spec import spec_text
from sparsify.prune.names import Wanted
from sparsify.prune.targets import choose, read_elsewhere
from sparsify.structure.orders import Order, Orders
from sparsify.world.world import World

# What is done to a group, and what became of it.
Made: TypeAlias = "tuple[Orders, ChannelResult | Refused]"


def choose_lanes(program: Program, own: ChannelPass, wanted: Wanted) -> tuple[list[Lanes], list[Refused]]:
    """The groups of channels that ``own`` is for, and those that stay in their order, each with the reason.

    Raises:
        SpecError: there is none.
    """
    try:
        targets, _ = choose(program, own.pattern, wanted)
    except SpecError as error:
        raise error.asking(spec_text(own)) from None
    named = {target.parameter for target in targets if target.sources is None}
    sites = find_sites(program)[0]
    look = _Look(program, wanted, named, {s.parameter for s in sites}, read_elsewhere(program, sites))
    chosen, left = list[Lanes](), list[Refused]()
    for group, found in find_lanes(program, own.unit):
        members = list(dict.fromkeys(m.parameter for m in group.members))
        if isinstance(found, Refused):
            if not look.wide(members):
                left.append(found)
            continue
        reason = look.why_not(found, members)
        if reason is None:
            chosen.append(found)
        elif reason:
            left.append(Refused(reason, found.name))
    if not chosen:
        reasons = "; ".join(f"{s.node}: {s.reason}" for s in left[:3]) or "no channels inside of a block"
        raise SpecError(
            spec_text(own), found=f"no channels that may change places ({reasons})", do=f"Leave {own.name} out"
        )
    return chosen, left


def _called(name: str, group: Lanes) -> str:
    """A layer or its weight in a sentence that begins with the group's name, which is that of what reads it."""
    return "it" if name.removesuffix(".weight") == group.name.removesuffix(".weight") else name


class _Look:
    """Why a group of channels stays in its order."""

    def __init__(
        self, program: Program, wanted: Wanted, named: set[str], linear: set[str], shared: Mapping[str, str]
    ) -> None:
        self.weights, self.wanted, self.named, self.linear, self.shared = program.weights, wanted, named, linear, shared
        self.blocks = any(block_of(name) is not None for name in linear)

    def wide(self, members: Sequence[str]) -> bool:
        """Whether they are of the residual width, or beside the blocks: of no concern here."""
        blocks = {block_of(name) for name in members}
        return self.blocks and (len(blocks) > 1 or None in blocks)

    def why_not(self, found: Lanes, members: Sequence[str]) -> str | None:
        """None where nothing speaks against it; an empty reason where nobody would have thought of it."""
        if self.wide(members):
            return self._joined(members)
        if not {site.parameter for site in found.sites} & self.named:
            return "" if self.wanted.only is not None else "what reads them is not pruned"
        for name in members:
            sources = frozenset(self.weights.sources(name))
            if name in self.shared:
                return f"{_called(name, found)} is shared with {self.shared[name]}"
            if sources & self.wanted.ignored:
                return f"{_called(name, found)} is named by --ignore"
            if self.wanted.only is not None and name in self.linear and not sources <= self.wanted.only:
                return f"{_called(name, found)} would be reordered too, and is not named by --only"
        return None

    def _joined(self, members: Sequence[str]) -> str:
        """Why those of several blocks are one group, where that is a weight that blocks share; else nothing."""
        shared = set(self.weights.aliases.values())
        tied = next((name for name in members if name in shared), None)
        if tied is None or any(block_of(name) is None for name in members):
            return ""
        return f"{tied} is shared by several blocks, whose channels would have to move alike"


def reorder(
    program: Program,
    own: ChannelPass,
    chosen: Sequence[Lanes],
    batches: Sequence[Mapping[str, Tensor]],
    context: Context,
    kept: Kept = NOT_KEPT,
) -> tuple[list[ChannelResult], list[Refused], Orders]:
    """Put the channels of each group of ``program`` into a better order.

    Args:
        kept: groups that a run before has finished, and where those of this one are kept.
        context: of several processes each orders some groups, and tells the others.

    Returns:
        What became of each group, those that stay as they are, and what was done to parameters.

    Raises:
        CalibrationError: an activation that is NaN or infinite.
        SpecError: every group has zeros already that another order would break.
    """
    missing = any(kept.find(lanes.name) is None for lanes in chosen)
    norms = _measured(program, own, chosen, batches, context) if missing else {}
    orders, results, left = Orders(), list[ChannelResult](), list[Refused]()
    world, begun = context.world, 0
    for some in _apart(chosen, world.size):
        mine = some[world.rank] if world.rank < len(some) else None
        made: Made | None = None
        if mine is not None and kept.find(mine.name) is None:
            world.says(f"reordering {mine.name}")
            with within_memory(f"reordering {mine.name}", context.device):
                made = _Group(program, own, mine, norms, context).reordered(begun + world.rank)
        for owner, lanes in enumerate(some):
            before = kept.find(lanes.name)
            done, found = _told(made, owner, world) if before is None else _of_row(before.row, before.tensors())
            if before is None and isinstance(found, ChannelResult):
                kept.add(lanes.name, *_as_entry(done, found))
            _write(program.weights, done, orders)
            if isinstance(found, Refused):
                left.append(found)
                continue
            results.append(found)
            context.observe(Progress("reordering", begun + owner + 1, len(chosen), lanes.name))
        begun += len(some)
    if not results:
        raise SpecError(spec_text(own), found=f"{left[0].node}: {left[0].reason}", do=f"Leave {own.name} out")
    return results, left, orders


def _apart(chosen: Sequence[Lanes], most: int) -> list[list[Lanes]]:
    """``chosen`` in their order, neighbours together that have no parameter in common, ``most`` at once: what is found
    of one is the same before and after the others.
    """
    found: list[list[Lanes]] = []
    touched = set[str]()
    for lanes in chosen:
        own = {site.parameter for site in lanes.sites}
        own |= {moving.parameter for lane in lanes.lanes for moving in lane.moving}
        if found and len(found[-1]) < most and touched.isdisjoint(own):
            found[-1].append(lanes)
            touched |= own
        else:
            found.append([lanes])
            touched = own
    return found


def _told(made: Made | None, owner: int, world: World) -> Made:
    """What process ``owner`` has ``made`` of its group, in every process."""
    if not world.divided:
        assert made is not None, "a process that is alone owns every group"
        return made
    said: dict[str, Any] | None = None
    places = dict[str, Tensor]()
    if made is not None and world.rank == owner:
        done, result = made
        if isinstance(result, Refused):
            said = {"refused": [result.reason, str(result.node)]}
        else:
            said, places = _as_entry(done, result)
            said["shapes"] = {name: list(value.shape) for name, value in places.items()}
    row = world.told(said)[owner]
    if "refused" in row:
        return Orders(), Refused(*row["refused"])
    return _of_row(
        row,
        {
            name: world.given(places.get(name, torch.empty(shape, dtype=torch.long)), owner)
            for name, shape in row["shapes"].items()
        },
    )


def _write(weights: Weights, done: Orders, orders: Orders) -> None:
    """Put parameters into the order that was found, and add it to ``orders``."""
    for name in done.of:
        weights.write(name, done.applied(name, weights.read(name)))
    for name, each in done.of.items():
        # Another group may have reordered another axis of it.
        orders.of.setdefault(name, []).extend(each)


def _measured(
    program: Program,
    own: ChannelPass,
    chosen: Sequence[Lanes],
    batches: Sequence[Mapping[str, Tensor]],
    context: Context,
) -> dict[str, Tensor]:
    """Parameter -> squared norms of its inputs [experts, in_features], in float64; of all the sites that read it."""
    wanted = {site.parameter for lanes in chosen for site in lanes.sites}
    sites = [site for site in find_sites(program)[0] if site.parameter in wanted]
    measuring = Measuring(program, sites, batches, own.statistics, context)
    norms: dict[str, Tensor] = {}
    for group, recorder in measuring.once():
        values = [recorder.accumulators["squared_norm"].value(e, measuring.sequences) for e in range(recorder.experts)]
        value = torch.stack(values).cpu()
        for name in {site.parameter for site in group.sites}:
            norms[name] = norms[name] + value if name in norms else value
    return norms


class _Group:
    """One group of channels with the matrices that read them, in float32."""

    def __init__(
        self, program: Program, own: ChannelPass, lanes: Lanes, norms: Mapping[str, Tensor], context: Context
    ) -> None:
        self.weights, self.own, self.lanes, self.norms, self.context = program.weights, own, lanes, norms, context
        self.matrices = {s.parameter: s.matrices(self.weights.read(s.parameter)) for s in lanes.sites}

    def reordered(self, number: int) -> Made:
        """What the pass does to the group; nothing is written."""
        started = time.perf_counter()
        for site in self.lanes.sites:
            if (pattern := _holds(self.matrices[site.parameter], self.own.unit)) is not None:
                reason = f"{_called(site.name, self.lanes)} has {pattern} zeros, which another order would break"
                return Orders(), Refused(reason, self.lanes.name)
        done, moved = Orders(), 0
        before = after = whole = 0.0
        for place, lane in enumerate(self.lanes.lanes):
            worth = self._worth(lane)
            old = self.own.kept(worth)
            order = self.own.order(worth, (self.context.seed * 100_003 + number) * 100_003 + place).cpu()
            new = self.own.kept(worth[order.to(worth.device)])
            whole += float(worth.sum(dtype=torch.float64))
            if new > old:
                moved += int((order != torch.arange(len(order))).sum())
                self._note(lane, order, done)
            before, after = before + old, after + max(old, new)
        self.matrices.clear()
        share = max(whole, torch.finfo(torch.float64).tiny)
        return done, ChannelResult(
            self.lanes.name, sum(lane.channels for lane in self.lanes.lanes), len(self.lanes.lanes), moved,
            before / share, after / share, sorted(done.of), time.perf_counter() - started,
        )  # fmt: skip

    def _worth(self, lane: Lane) -> Tensor:
        """[channels, rows]: of every matrix that reads the lane, and of every run of neighbours in it."""
        rows = []
        for reading in lane.reading:
            site, name = reading.site, reading.site.parameter
            experts = range(site.experts) if lane.expert is None else [lane.expert]
            for expert in experts:
                norm = self.norms[name][expert].to(self.context.device)
                # An expert that no token reached is ordered by its weights alone; the scale of a lane means nothing.
                norm = (
                    (norm / norm.max().clamp_min(1e-300)).float() if bool(norm.any()) else torch.ones_like(norm).float()
                )
                for run in reading.runs:
                    at = torch.from_numpy(run).to(self.context.device)
                    columns = self.matrices[name][expert].to(self.context.device).index_select(1, at).float()
                    rows.append(self.own.worth(columns, norm[at]).t())
        return torch.cat(rows, dim=1).contiguous()

    def _note(self, lane: Lane, order: Tensor, done: Orders) -> None:
        for moving in lane.moving:
            name, stack = moving.parameter, self.lanes.stacked.get(moving.parameter)
            places = torch.from_numpy(moving.places)
            at = done.at(name, moving.axis, stack, self.weights.shape(name))
            at.places[lane.expert or 0, places] = places[order]


def _as_entry(done: Orders, result: ChannelResult) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What was done to a group, as a journal keeps it."""
    each = [(name, order) for name, orders in done.of.items() for order in orders]
    told = [[name, order.axis, order.stack] for name, order in each]
    return {"result": asdict(result), "orders": told}, {str(n): order.places for n, (_, order) in enumerate(each)}


def _of_row(row: Mapping[str, Any], places: Mapping[str, Tensor]) -> Made:
    done = Orders()
    for number, (name, axis, stack) in enumerate(row["orders"]):
        done.of.setdefault(name, []).append(Order(axis, stack, places[str(number)]))
    return done, ChannelResult(**row["result"])


def _holds(matrices: Tensor, unit: int) -> str | None:
    """The N:M pattern that zeros in ``matrices`` [experts, out_features, in_features] lie in, if any."""
    for m, most in dict.fromkeys([(4, 3), (8, 4), (unit, unit // 2)]):
        if (n := nm_most(matrices, m)) <= most:
            return f"{n}:{m}"
    return None
