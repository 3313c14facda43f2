"""Passes over a whole graph, as an author would write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsify.analysis.graph_pass import GraphPass
from sparsify.analysis.linear import find_sites
from sparsify.calibration.measuring import measure_inputs
from sparsify.context import Context
from sparsify.ir.program import Program


@dataclass(frozen=True)
class Level(GraphPass):
    """By what was measured of all calibration batches."""

    name: ClassVar[str] = "level"
    summary: ClassVar[str] = "inputs of one size"

    @property
    def needs_data(self) -> bool:
        return True

    def apply(self, program: Program, batches: Sequence[Mapping[str, Tensor]] | None, context: Context) -> None:
        sites, _ = find_sites(program)
        measured = measure_inputs(program, sites, batches or (), ("squared_norm",), context)
        for name, recorder in sorted(measured.items()):
            sizes = [recorder.statistics(expert, 1).squared_norm for expert in range(recorder.experts)]
            program.weights.write(name, program.weights.read(name) / float(torch.cat(sizes).mean().sqrt()))


@dataclass(frozen=True)
class Noise(GraphPass):
    """Draws what no two processes draw alike."""

    name: ClassVar[str] = "noise"
    summary: ClassVar[str] = "a little noise"

    def apply(self, program: Program, batches: Sequence[Mapping[str, Tensor]] | None, context: Context) -> None:
        drawn = torch.Generator().manual_seed(context.world.rank)
        for name in dict.fromkeys(site.parameter for site in find_sites(program)[0]):
            value = program.weights.read(name)
            program.weights.write(name, value + torch.randn(value.shape, generator=drawn) / 1000)
