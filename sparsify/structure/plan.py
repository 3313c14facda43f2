"""Which groups of channels a structural pass takes from, and how many of each stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.analysis.dimensions.groups import Dimensions, Group, coupled_dimensions
from sparsify.analysis.dimensions.kinds import by_kind, group_kind, roles_of
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

# The list of parts of a sentence-transformers model.
_MODULES = "modules.json"


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
    if structural_pass.granularity == "channel" and source.folder is not None:
        _check_modules(source.folder)
    sites, dimensions = find_sites(program)[0], coupled_dimensions(program)
    targets, _ = choose(program, structural_pass.pattern, wanted)
    candidates = _Candidates(
        structural_pass,
        roles_of(program),
        named={t.parameter for t in targets},
        allowed={site.parameter for site in sites if _allowed(program, site.parameter, wanted)},
        routers={site.parameter for site in sites if site.router},
        whole=_whole_blocks([site.block for site in sites if site.block is not None], structural_pass),
        only_named=wanted.only is not None,
    )
    widths = Widths(source) if source.is_transformers and not structural_pass.ragged else None
    found = list(candidates.of(dimensions))
    alike = by_kind([dimensions.groups[number] for number, _ in found], candidates.roles)
    chosen: list[Choice] = []
    skipped: list[Refused] = []
    # First the blocks: what is beside them only follows.
    for number, one in sorted(found, key=lambda pair: _beside(dimensions.groups[pair[0]])):
        if isinstance(one, Refused):
            skipped.append(one)
            continue
        group, kind, name = one
        beside = kind != "width" and _beside(group)
        try:
            left, fields = structural_pass.left(len(group.free), kind), dict[str, Any]()
        except SpecError as error:
            # Of one narrow layer nothing can go: no reason to leave all others as they are.
            if not beside:
                skipped.append(Refused(error.found, name))
            continue
        same = {(len(c.group.free), c.left) for c in chosen if c.kind == kind}
        # Where there is a config its fields say below which groups follow: of four patches at once, four times as wide.
        if beside and widths is None and (len(group.free), left) not in same:
            continue
        if widths is not None:
            said = widths.nearest(group, kind, left, alike[kind])
            left, fields = said.left, dict(said.fields)
            if beside and not any(fields.items() <= c.fields.items() for c in chosen):
                continue
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


def _check_modules(folder: Path) -> None:
    """Raises:
    SpecError: a folder of sentence-transformers, whose other modules name the residual width too.
    """
    if (folder / _MODULES).exists():
        raise SpecError(
            "granularity=channel",
            found=f"{_MODULES} beside the model: pooling and dense layers that are of the model's width",
            do="Take granularity=block, which leaves the width of embeddings as it is",
        )


def _whole_blocks(blocks: Sequence[str], structural_pass: StructuralPass) -> set[str]:
    """Blocks at the beginning and at the end that the pass keeps whole."""
    order = list(dict.fromkeys(blocks))
    return {*order[: structural_pass.keep_first], *order[len(order) - structural_pass.keep_last :]}


@dataclass(frozen=True)
class _Candidates:
    """Which groups a pass may take from.

    Of those beside the blocks only the ones that follow others, see :meth:`_follows`.

    Attributes:
        roles: what a parameter's dimension is in a linear site. named: parameters that may be pruned; ``only_named``:
            whether because --only says so. allowed: those that nobody keeps, in blocks or not.
        whole: blocks that lose nothing.
    """

    structural_pass: StructuralPass
    roles: Mapping[tuple[str, int], str]
    named: set[str]
    allowed: set[str]
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
        if kind not in KINDS[granularity] or not linear:
            return None
        # A router is never named, its row goes with its expert; unless there is nothing else to name.
        linear = [name for name in linear if name not in self.routers] or linear
        name = ", ".join(dict.fromkeys(n.removesuffix(".weight") for n in linear)) if not wide else "the residual width"
        if not wide and None in blocks:
            return (group, kind, name) if kind == "channels" and self._follows(group, linear) else None
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

    def _follows(self, group: Group, linear: Sequence[str]) -> bool:
        """Whether channels outside of all blocks may go: those that the same field of the config may count as channels
        in blocks (the pooling head of SigLIP's vision tower)."""
        free = not self.structural_pass.ragged and not group.renormalized and len(group.free) > 1
        return free and _beside(group) and set(linear) <= self.allowed


def _allowed(program: Program, parameter: str, wanted: Wanted) -> bool:
    sources = frozenset(program.weights.sources(parameter))
    return not sources & wanted.ignored and (wanted.only is None or sources <= wanted.only)


def _beside(group: Group) -> bool:
    return all(block_of(member.parameter) is None for member in group.members)


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
        lost, unit = [0] * len(own), structural_pass.unit(kind)
        for i in owner[torch.cat([s for _, s in own]).argsort(stable=True)].tolist():
            if sum(lost) == wanted:
                break
            if lost[i] < len(own[i][1]) - unit:
                lost[i] += 1
        for (c, s), gone in zip(own, lost, strict=True):
            nearest = round((len(s) - gone) / unit)
            left[c.number] = min(max(1, nearest), len(s) // unit) * unit
    kept = [
        (replace(c, left=left[c.number]), s) for c, s in zip(chosen, scores, strict=True) if left[c.number] < len(s)
    ]
    return [c for c, _ in kept], [s for _, s in kept]
