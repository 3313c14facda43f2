"""Which groups of channels a structural pass takes from, and how many of each stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsify.analysis.dimensions.groups import Dimensions, Group, coupled_dimensions
from sparsify.analysis.dimensions.kinds import Roles, group_kind, roles_of
from sparsify.analysis.linear import block_of, find_sites
from sparsify.errors import Refused, SpecError
from sparsify.frontend.source import Source
from sparsify.ir.program import Program
from sparsify.method.structural_pass import KINDS, StructuralPass
from sparsify.prune.names import Wanted
from sparsify.prune.targets import choose
from sparsify.structure import layers
from sparsify.structure.config import Widths
from sparsify.structure.record import Cut, Restructured


@dataclass(frozen=True)
class Choice:
    """A group that channels are taken from: ``left`` of its free channels stay; ``fields`` of the config say it."""

    number: int
    group: Group
    kind: str
    name: str
    left: int
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Choices:
    """Every group that a pass is for, of these dimensions; and those that it leaves whole."""

    dimensions: Dimensions
    chosen: list[Choice]
    skipped: list[Refused]


def plan(source: Source, program: Program, structural_pass: StructuralPass, wanted: Wanted) -> Restructured:
    """What a pass would do: which groups, from how many to how many; reads no weight.

    Raises:
        SpecError: a ratio that leaves nothing, or groups that all are pinned or not named.
    """
    before = count_parameters(source)
    if structural_pass.granularity == "layer":
        stack = layers.stack_of(program)
        left = stack.count - layers.count_removed(stack, structural_pass)
        cut = Cut("layers", stack.container, stack.count, left, (), ())
        return Restructured(structural_pass, [cut], [], {}, (before, 0))
    found = choose_groups(source, program, structural_pass, wanted)
    cuts = [Cut(c.kind, c.name, len(c.group.free), c.left, (), ()) for c in found.chosen]
    return Restructured(structural_pass, cuts, found.skipped, {}, (before, 0))


def count_parameters(source: Source) -> int:
    return sum(p.numel() for p in source.module.parameters())


def parameters_of(program: Program, chosen: Sequence[Choice]) -> list[str]:
    """The weights of linear sites that are in any of the groups."""
    linear = {site.parameter for site in find_sites(program)[0]}
    return list(dict.fromkeys(m.parameter for c in chosen for m in c.group.members if m.parameter in linear))


def choose_groups(source: Source, program: Program, structural_pass: StructuralPass, wanted: Wanted) -> Choices:
    """The groups that the pass is for, and how many channels of each stay.

    Raises:
        SpecError: there is none.
    """
    sites, dimensions = find_sites(program)[0], coupled_dimensions(program)
    targets, _ = choose(program, structural_pass.pattern, wanted)
    candidates = _Candidates(
        structural_pass,
        roles_of(program),
        named={t.parameter for t in targets},
        routers={site.parameter for site in sites if site.router},
        whole=_whole_blocks([site.block for site in sites if site.block is not None], structural_pass),
        only_named=wanted.only is not None,
    )
    widths = Widths(source) if source.is_transformers and not structural_pass.ragged else None
    alike = _alike(dimensions, candidates.roles)
    chosen: list[Choice] = []
    skipped: list[Refused] = []
    for number, found in candidates.of(dimensions):
        if isinstance(found, Refused):
            skipped.append(found)
            continue
        group, kind, name = found
        left, fields = structural_pass.left(len(group.free), kind), dict[str, Any]()
        if widths is not None:
            said = widths.nearest(group, kind, left, alike[kind])
            left, fields = said.left, dict(said.fields)
            if said.reason is not None:
                skipped.append(Refused(said.reason, name))
        if left < len(group.free):
            chosen.append(Choice(number, group, kind, name, left, fields))
    if not chosen:
        reasons = "; ".join(f"{s.node}: {s.reason}" for s in skipped[:3]) or "no group of channels"
        raise SpecError(
            f"pass {structural_pass.name}",
            found=f"nothing that can be removed ({reasons})",
            do="See sparsify inspect MODEL --dimensions",
        )
    return Choices(dimensions, chosen, skipped)


def _alike(dimensions: Dimensions, roles: Roles) -> dict[str, set[tuple[str, int]]]:
    """The dimensions that are in groups of each kind, of which any may shrink."""
    found: dict[str, set[tuple[str, int]]] = {}
    for group in dimensions.prunable:
        found.setdefault(group_kind(group, roles), set()).update((m.parameter, m.axis) for m in group.members)
    return found


def _whole_blocks(blocks: Sequence[str], structural_pass: StructuralPass) -> set[str]:
    """Blocks at the beginning and at the end that the pass keeps whole."""
    order = list(dict.fromkeys(blocks))
    return {*order[: structural_pass.keep_first], *order[len(order) - structural_pass.keep_last :]}


@dataclass(frozen=True)
class _Candidates:
    """Which groups a pass may take from.

    Attributes:
        roles: what a parameter's dimension is in a linear site. named: parameters that may be pruned; ``only_named``:
            whether because --only says so. whole: blocks that lose nothing.
    """

    structural_pass: StructuralPass
    roles: Mapping[tuple[str, int], str]
    named: set[str]
    routers: set[str]
    whole: set[str]
    only_named: bool

    def of(self, dimensions: Dimensions) -> Iterator[tuple[int, tuple[Group, str, str] | Refused]]:
        """Number, and group with its kind and name or why it stays whole; those that are of no concern left out."""
        for number, group in enumerate(dimensions.groups):
            found = self._look(group)
            if found is not None:
                yield number, found

    def _look(self, group: Group) -> tuple[Group, str, str] | Refused | None:
        kind, granularity = group_kind(group, self.roles), self.structural_pass.granularity
        linear = [m.parameter for m in group.members if (m.parameter, m.axis) in self.roles]
        blocks = {block_of(m.parameter) for m in group.members}
        wide = kind == "width"
        if kind not in KINDS[granularity] or not linear or (not wide and None in blocks):
            return None
        # A router is never named, its row goes with its expert; unless there is nothing else to name.
        linear = [name for name in linear if name not in self.routers] or linear
        name = ", ".join(dict.fromkeys(n.removesuffix(".weight") for n in linear)) if not wide else "the residual width"
        if not wide and not set(linear) <= self.named:
            if not set(linear) & self.named and self.only_named:
                return None
            return Refused("not all of it is named, or it is shared or ignored", name)
        if blocks & self.whole:
            return Refused("in a block that is kept whole", name)
        if group.renormalized and kind in KINDS["block"]:
            return Refused("a norm is taken over them, which fewer would change", name)
        if len(group.free) < 2:
            return Refused(group.reason or "a single one", name)
        return group, kind, name


def share_out(
    structural_pass: StructuralPass, chosen: Sequence[Choice], scores: Sequence[Tensor]
) -> tuple[list[Choice], list[Tensor]]:
    """As many channels of each kind as before, but the least of all groups together; scores by their group's mean.

    The official code compares heads and channels on one scale, where the sums over a head's columns always win.
    """
    left = {c.number: c.left for c in chosen}
    for kind in {c.kind for c in chosen}:
        own = [(c, s / s.mean().clamp(min=1e-300)) for c, s in zip(chosen, scores, strict=True) if c.kind == kind]
        wanted = sum(len(s) - c.left for c, s in own)
        owner = torch.cat([torch.full((len(s),), i) for i, (_, s) in enumerate(own)])
        lost = [0] * len(own)
        for i in owner[torch.cat([s for _, s in own]).argsort(stable=True)].tolist():
            unit = structural_pass.unit(len(own[i][1]), kind)
            if sum(lost) == wanted:
                break
            if lost[i] < len(own[i][1]) - unit:
                lost[i] += 1
        for (c, s), gone in zip(own, lost, strict=True):
            unit = structural_pass.unit(len(s), kind)
            left[c.number] = max(unit, round((len(s) - gone) / unit) * unit)
    kept = [
        (replace(c, left=left[c.number]), s) for c, s in zip(chosen, scores, strict=True) if left[c.number] < len(s)
    ]
    return [c for c, _ in kept], [s for _, s in kept]
