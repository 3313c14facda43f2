"""Shows a structural pass the parameters of a group, with their gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsify.analysis.linear import find_sites
from sparsify.calibration.sums import Gradients
from sparsify.ir.program import Program
from sparsify.method.structural_pass import Part, StructuralPass
from sparsify.structure.plan import Choice


class Scores:
    """What a pass says of a program's groups, one after the other.

    Args:
        gradients: of the parameters, summed over ``samples``, where the pass asks for some.
        seed: of what is drawn; another one for every group.
    """

    def __init__(
        self, program: Program, structural_pass: StructuralPass, gradients: Gradients, samples: int, seed: int
    ) -> None:
        self.program, self.structural_pass, self.gradients = program, structural_pass, gradients
        self.samples, self.seed = samples, seed
        self.sites = {site.parameter: site for site in find_sites(program)[0]}

    def of_channels(self, choice: Choice) -> Tensor:
        """One score for each channel of a group."""
        members = [member for member in choice.group.members if member.parameter in self.sites]
        channels = [torch.from_numpy(m.channel) for m in members]
        places = common_places(channels, choice.group.channels)
        parts = [self._part(m.parameter, m.axis, own, places) for m, own in zip(members, channels, strict=True)]
        return self.structural_pass.scores(parts, choice.group.channels, self.seed * 100_003 + choice.number)

    def of_all(self, names: Sequence[str], number: int) -> float:
        """One score for all of the parameters ``names`` together, the ``number``-th that is asked for."""
        # Rows of one matrix are not those of another: the parameters are compared as wholes.
        parts = [self._part(n, 0, torch.zeros(self.program.weights.shape(n)[0], dtype=torch.long), 1) for n in names]
        return float(self.structural_pass.scores(parts, 1, self.seed + number)[0]) if parts else 0.0

    def _part(self, name: str, axis: int, channel: Tensor, places: int) -> Part:
        weight = self.program.weights.read(name)

        def rows(value: Tensor) -> Tensor:
            return value.float().movedim(axis, 0).reshape(value.shape[axis], -1)

        gradient = fisher = None
        if self.structural_pass.statistics:
            site = self.sites[name]
            found = {n: site.layout(v, weight) for n, v in self.gradients.read(site).items()}
            # Sums over samples, as they were measured; means here.
            gradient = rows(found["gradient"]) / self.samples if "gradient" in found else None
            fisher = rows(found["gradient_l2"]).square() / self.samples if "gradient_l2" in found else None
        return Part(rows(weight), gradient, fisher, channel, rank_in_channel(channel) % places, places)


def common_places(channels: Sequence[Tensor], count: int) -> int:
    """Into how many places a channel is cut that all parameters have: of heads one for each column.

    A parameter with several times as many positions (query heads that share a key-value head) has several in a place.

    Args:
        channels: of each parameter, the channel of each position. count: channels.
    """
    counts = [torch.bincount(own, minlength=count) for own in channels]
    return math.gcd(*(int(n) for own in counts for n in own)) or 1


def rank_in_channel(channel: Tensor) -> Tensor:
    """For each position, how many before it belong to its channel: [positions]."""
    order = channel.argsort(stable=True)
    first = torch.searchsorted(channel[order], channel)
    rank = torch.empty_like(channel)
    rank[order] = torch.arange(len(channel), dtype=channel.dtype)
    return rank - first
