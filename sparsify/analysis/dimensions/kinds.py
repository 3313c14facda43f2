"""What a group of coupled dimensions is: the residual width, heads, experts or channels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sparsify.analysis.dimensions.groups import Group
from sparsify.analysis.linear import block_of, find_sites
from sparsify.ir.program import Program

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


def by_kind(groups: Iterable[Group], roles: Roles) -> dict[str, set[tuple[str, int]]]:
    """The (parameter, axis) that groups of each kind hold."""
    found: dict[str, set[tuple[str, int]]] = {}
    for group in groups:
        found.setdefault(group_kind(group, roles), set()).update((m.parameter, m.axis) for m in group.members)
    return found


def roles_of(program: Program) -> dict[tuple[str, int], str]:
    """(parameter, axis) of every linear site -> ``outputs``, ``inputs`` or ``experts``."""
    roles: dict[tuple[str, int], str] = {}
    for site in find_sites(program)[0]:
        roles |= {(site.parameter, site.out_axis): "outputs", (site.parameter, site.in_axis): "inputs"}
        if site.expert_axis is not None and site.window is None:
            roles[site.parameter, site.expert_axis] = "experts"
    return roles
