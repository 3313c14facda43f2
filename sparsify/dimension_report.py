"""``sparsify inspect --dimensions``: the coupled dimensions of a model, in sentences, as JSON, or as a DOT graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from torch import nn

from sparsify.analysis import find_sites
from sparsify.analysis.dimension import Dimensions, Group, Member, coupled_dimensions
from sparsify.analysis.linear import block_of
from sparsify.calibration.data import example_batch
from sparsify.capture import capture
from sparsify.program import Program
from sparsify.source import open_source

Roles = Mapping[tuple[str, int], str]


def group_kind(group: Group, roles: Roles) -> str:
    """``width`` of the residual stream, ``experts``, ``heads`` or ``channels``.

    Args:
        roles: what a parameter's dimension is in a linear site: outputs, inputs or experts.
    """
    if len({block_of(m.parameter) for m in group.members}) > 2:
        return "width"
    linear = [m for m in group.members if (m.parameter, m.axis) in roles]
    if any(roles[m.parameter, m.axis] == "experts" for m in linear):
        return "experts"
    # A head takes several neighbouring positions of every matrix that it is in.
    whole = [bool((m.channel[1:] == m.channel[:-1]).any()) for m in linear]
    return "heads" if whole and all(whole) else "channels"


@dataclass(frozen=True)
class DimensionReport:
    """``roles``: what a parameter's dimension is in a linear site."""

    name: str
    dimensions: Dimensions
    roles: Roles

    def kind(self, group: Group) -> str:
        return group_kind(group, self.roles)

    def lines(self) -> list[str]:
        prunable = self.dimensions.prunable
        text = [f"{self.name}: {len(prunable)} groups of coupled dimensions"]
        text += [self.sentence(group) for group in prunable]
        for group in self.dimensions.groups[len(prunable) :]:
            names = ", ".join(self._member(m) for m in group.members[:3])
            more = f" and {len(group.members) - 3} more" if len(group.members) > 3 else ""
            text.append(f"pinned: {names}{more}: {group.reason}")
        text += [f"no rule for {name} (first at {node}): what it reads is pinned"
                 for name, node in self.dimensions.without_rule.items()]  # fmt: skip
        return text

    def sentence(self, group: Group) -> str:
        kind, free = self.kind(group), len(group.free)
        what = {"width": "channels of the residual width", "channels": "channels"}.get(kind, kind)
        pinned = "" if free == group.channels else f" ({group.channels - free} more are pinned: {group.reason})"
        shown = group.members if kind != "width" else group.members[:6]
        names = ", ".join(self._member(m) for m in shown)
        more = f" and {len(group.members) - len(shown)} more" if len(shown) < len(group.members) else ""
        changes = "; a norm, a softmax or a choice is taken over them" if group.renormalized else ""
        return f"{free} {what}{pinned}: {names}{more}{changes}"

    def _member(self, member: Member) -> str:
        role = self.roles.get((member.parameter, member.axis), f"dimension {member.axis}")
        each = sorted(set(numpy.bincount(member.channel).tolist()))
        many = "" if each == [1] else f" ({'/'.join(map(str, each))} each)"
        return f"{member.parameter.removesuffix('.weight')} {role}{many}"

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": self.name,
            "groups": [
                {
                    "kind": self.kind(g),
                    "channels": g.channels,
                    "free": len(g.free),
                    "renormalized": g.renormalized,
                    "reason": g.reason,
                    "members": [
                        {
                            "parameter": m.parameter,
                            "axis": m.axis,
                            "role": self.roles.get((m.parameter, m.axis)),
                            "size": len(m.channel),
                            "channel": m.channel.tolist() if g.channels != len(m.channel) else None,
                        }
                        for m in g.members
                    ],
                }
                for g in self.dimensions.groups
            ],
            "without_rule": self.dimensions.without_rule,
        }

    def dot(self) -> str:
        """Groups in ellipses, parameters in boxes."""
        out = ["graph dimensions {", "  rankdir=LR; node [fontsize=10];"]
        for number, group in enumerate(self.dimensions.prunable):
            out.append(f'  g{number} [shape=ellipse,label="{len(group.free)} {self.kind(group)}"];')
            for m in group.members:
                role = self.roles.get((m.parameter, m.axis), f"dimension {m.axis}")
                out += [f'  "{m.parameter}" [shape=box];', f'  g{number} -- "{m.parameter}" [label="{role}"];']
        return "\n".join([*out, "}"]) + "\n"


def inspect_dimensions(
    model: str | Path | nn.Module, *, allow_bin: bool = False, trust_remote_code: bool = False
) -> DimensionReport:
    """Trace ``model`` without reading a weight and find its coupled dimensions."""
    source = open_source(model, allow_bin=allow_bin, trust_remote_code=trust_remote_code)
    program = capture(source, example_batch(source))
    return DimensionReport(source.name, coupled_dimensions(program), roles_of(program))


def roles_of(program: Program) -> dict[tuple[str, int], str]:
    """(parameter, axis) of every linear site -> ``outputs``, ``inputs`` or ``experts``."""
    roles: dict[tuple[str, int], str] = {}
    for site in find_sites(program)[0]:
        roles |= {(site.parameter, site.out_axis): "outputs", (site.parameter, site.in_axis): "inputs"}
        if site.expert_axis is not None and site.window is None:
            roles[site.parameter, site.expert_axis] = "experts"
    return roles
