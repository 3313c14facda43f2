"""Weight passes run on a program that was captured once, in the place of a compile that captures it anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from support.regions import CPU
from torch import Tensor

from sparsify.calibration.gradients import Samples
from sparsify.context import Context, SiteResult
from sparsify.ir.program import Program
from sparsify.ir.store import MemoryStore
from sparsify.method.spec import parse_pass
from sparsify.method.weight_pass import WeightPass
from sparsify.prune.engine import prune
from sparsify.prune.names import Wanted
from sparsify.prune.targets import choose


def fresh(program: Program) -> Program:
    """The same graph over weights that may be written to."""
    return replace(program, weights=program.weights.on(MemoryStore(program.weights.store)))


def prune_captured(
    program: Program,
    spec: str,
    batches: Sequence[Mapping[str, Tensor]],
    schedule: Any = "layer",
    memory: int = 8 << 30,
    device: torch.device = CPU,
) -> tuple[dict[str, Tensor], list[SiteResult]]:
    """The weights that ``spec`` pruned, by name, and what is said of each; ``program`` stays as it is."""
    own, copy = parse_pass(spec), fresh(program)
    assert isinstance(own, WeightPass)
    targets, _ = choose(copy, own.pattern, Wanted())
    data, context = Samples(batches), Context(device, memory)
    done = prune(copy, own, targets, data, context, schedule=schedule, dense=program.weights)
    return {target.parameter: copy.weights.read(target.parameter) for target in targets}, done
