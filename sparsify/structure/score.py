"""Shows a structural pass the parameters of a group, with their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsify.analysis.linear import find_sites
from sparsify.calibration.gradients import Gradients
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
        parts = [self._part(m.parameter, m.axis, torch.from_numpy(m.channel)) for m in members]
        return self.structural_pass.scores(parts, choice.group.channels, self.seed * 100_003 + choice.number)

    def of_all(self, names: Sequence[str], number: int) -> float:
        """One score for all of the parameters ``names`` together, the ``number``-th that is asked for."""
        parts = [self._part(n, 0, torch.zeros(self.program.weights.shape(n)[0], dtype=torch.long)) for n in names]
        return float(self.structural_pass.scores(parts, 1, self.seed + number)[0]) if parts else 0.0

    def _part(self, name: str, axis: int, channel: Tensor) -> Part:
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
        return Part(rows(weight), gradient, fisher, channel)
