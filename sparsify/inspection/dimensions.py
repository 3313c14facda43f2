"""``sparsify inspect --dimensions``: the coupled dimensions of a model, in sentences, as JSON, or as a DOT graph."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from torch import nn

from sparsify.analysis.dimensions.groups import Dimensions, Group, Member, coupled_dimensions
from sparsify.analysis.dimensions.kinds import Roles, group_kind, roles_of
from sparsify.data.batches import example_batch
from sparsify.frontend.capture import Batch, capture
from sparsify.frontend.source import open_source


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
        text += [
            f"no rule for {name} (first at {node}): what it reads is pinned"
            for name, node in self.dimensions.without_rule.items()
        ]
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
    model: str | Path | nn.Module,
    *,
    batch: Batch | None = None,
    allow_bin: bool = False,
    trust_remote_code: bool = False,
    check: bool = True,
) -> DimensionReport:
    """Trace ``model`` without reading a weight and find its coupled dimensions.

    Args:
        batch: inputs to trace it by, where its config does not tell them; only shapes and dtypes matter.
    """
    # Whoever looks at a model may look at a broken one.
    source = open_source(model, allow_bin=allow_bin, trust_remote_code=trust_remote_code, check=check, allow_nan=True)
    program = capture(source, batch or example_batch(source))
    return DimensionReport(source.name, coupled_dimensions(program), roles_of(program))
