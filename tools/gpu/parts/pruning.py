"""Pruning itself on the GPU: the same zeros as on the CPU, whole runs of a random 1B-shaped model against its plain
forward, and metrics alone."""

from __future__ import annotations

from functools import partial

import torch
from machine import Found, Machine, Step
from results import Results
from torch import Tensor

from parts import agreement
from sparsify.calibration.gradients import Samples
from sparsify.calibration.recorder import GroupRecorder
from sparsify.context import Context, SiteResult
from sparsify.data.batches import load_calibration
from sparsify.frontend.capture import capture
from sparsify.frontend.source import open_source
from sparsify.ir.store import MemoryStore
from sparsify.method.spec import parse_pass
from sparsify.method.statistics import InputStatistics
from sparsify.method.weight_pass import WeightPass
from sparsify.prune.engine import prune
from sparsify.prune.names import Wanted
from sparsify.prune.targets import choose
from sparsify.words import Schedule

# Spec and schedule.
RUNS: list[tuple[str, Schedule]] = [
    ("wanda:2:4", "block"),
    ("wanda:2:4", "layer"),
    # Those that take longest, behind everything else.
    ("sparsegpt:2:4", "layer"),
    ("twin:2:4", "layer"),
]


def steps(machine: Machine, results: Results) -> list[Step]:
    """One model for all of them, made when the first asks for it."""
    trial = Trial(machine)
    runs: list[Step] = [(f"{spec} {schedule}", partial(trial.run, spec, schedule)) for spec, schedule in RUNS]
    return [("metrics", partial(metrics, machine)), runs[0], *agreement.steps(machine, results), *runs[1:]]


class Trial:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._made = False

    def _make(self) -> None:
        import transformers

        machine = self.machine
        torch.manual_seed(0)
        # Made there, where random numbers are fast, and kept where a user's model lies.
        with torch.device(machine.device):
            made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**machine.sizes.pruned))
        self.model = made.bfloat16().eval().to("cpu")
        ids = torch.randint(machine.sizes.pruned["vocab_size"], (machine.sizes.samples, machine.sizes.length))
        self.source = open_source(self.model)
        self.samples = Samples(load_calibration([ids], self.source).batches)
        self.program = capture(self.source, dict(self.samples.batches[0]))
        self.forward_seconds, self.forward_bytes = self._forward()
        self._made = True

    def _forward(self) -> tuple[float, int]:
        """The blocks of the plain model on the GPU, over the same batches; its weights brought there before."""
        there = self.model.to(self.machine.device)

        def forward() -> None:
            with torch.no_grad():
                for batch in self.samples.batches:
                    there.model(batch["input_ids"].to(self.machine.device), use_cache=False)

        forward()
        found = self.machine.measured(forward)
        self.model.to("cpu")
        return found

    def run(self, spec: str, schedule: Schedule) -> Found:
        if not self._made:
            self._make()
        weight_pass = parse_pass(spec)
        if not isinstance(weight_pass, WeightPass):
            raise TypeError(f"{spec} prunes no weights")
        targets, _ = choose(self.program, weight_pass.pattern, Wanted())
        self.program.weights = self.source.weights.on(MemoryStore(self.source.weights.store))
        results: list[SiteResult] = []

        def whole() -> None:
            dense = self.source.weights
            results[:] = prune(
                self.program, weight_pass, targets, self.samples, Context(device=self.machine.device),
                schedule=schedule, dense=dense,
            )  # fmt: skip

        seconds, peak = self.machine.measured(whole)
        if {round(r.kept, 3) for r in results} != {0.5}:
            raise AssertionError(f"kept {sorted({r.kept for r in results})} of the weights")
        return {
            "whole_seconds": seconds,
            "forward_seconds": self.forward_seconds,
            "times_forward": seconds / self.forward_seconds,
            "peak_bytes": peak,
            "forward_bytes": self.forward_bytes,
            "sites": len(results),
        }


def metrics(machine: Machine) -> Found:
    """Wanda's metric of one square matrix against SparseGPT's mask and update, statistics included; the paper's Table 4
    counts the same of a whole model."""
    size = machine.sizes.square
    generator = torch.Generator(machine.device).manual_seed(0)
    x = torch.randn(4 * size, size, generator=generator, device=machine.device)
    weight = torch.randn(size, size, generator=generator, device=machine.device)
    seconds = {}
    for spec, wanted in (("wanda:2:4", ("squared_norm",)), ("sparsegpt:2:4", ("gram", "squared_norm"))):
        weight_pass = parse_pass(spec)
        if not isinstance(weight_pass, WeightPass):
            raise TypeError(f"{spec} prunes no weights")
        once = partial(_prune_once, weight_pass, weight, x, wanted)
        once()
        seconds[spec] = min(machine.measured(once)[0] for _ in range(3))
    one, other = seconds.values()
    return {"wanda_seconds": one, "sparsegpt_seconds": other, "cheaper": other / one}


def _prune_once(weight_pass: WeightPass, weight: Tensor, x: Tensor, wanted: tuple[str, ...]) -> None:
    with torch.no_grad():
        weight_pass.prune(weight, _recorded(x, wanted))


def _recorded(x: Tensor, wanted: tuple[str, ...]) -> InputStatistics:
    recorder = GroupRecorder(wanted, 1, x.shape[1], x.device)
    for accumulator in recorder.accumulators.values():
        accumulator.update(0, x, x)
    return recorder.statistics(0, 1)
