"""A packed folder whose 2:4 weights a GPU runs on its sparse tensor cores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsify.backends.cuda.report import kernels_by_tokens
from sparsify.backends.packed.choosing import Decision
from sparsify.backends.packed.job import PackedJob
from sparsify.backends.packed.loaded.on_gpu import prepare
from sparsify.backends.packed.options import Options
from sparsify.backends.packed.plan import siblings, summary
from sparsify.context import Progress, report
from sparsify.frontend.source import Source
from sparsify.ir.program import Program
from sparsify.ir.weights import Weights
from sparsify.runtime.cuda.autotune.times import timings_of
from sparsify.runtime.cuda.dispatch import Timings, default_plan
from sparsify.runtime.cuda.fragments import DTYPES
from sparsify.runtime.cuda.gpu import GPU, NO_EXPERTS, current_gpu
from sparsify.runtime.words import Policy

# What a model is traced for where there is no GPU: nothing of it but "it has a compiler and sparse tensor cores"
# counts.
_ANY = GPU("any GPU", (9, 0), 132, True, "cusparselt")


class CudaJob(PackedJob):
    """One output folder, packed for GPUs.

    Raises:
        BackendError: no weight is 2:4, or the folder cannot be written.
    """

    def __init__(self, source: Source, out: Path, *, overwrite: bool, policy: Policy, tune: bool) -> None:
        # Weights on a grid keep their dtype: what is timed here is chosen by full width.
        whole = Options(layout="packed24", choice="smallest", values="full")
        super().__init__(source, out, overwrite=overwrite, options=whole)
        self.policy, self.tune = policy, tune
        self.timings: dict[str, Timings] = {}
        self.groups: list[list[str]] = []
        self.rounded = False

    def options(self) -> dict[str, str | bool]:
        return {"policy": self.policy, "tune": self.tune}

    def advice(self, pruned: bool) -> str:
        if pruned:
            return "GPUs multiply 2:4 alone (--pass wanda:2:4)"
        return "Prune it to 2:4 first (--pass wanda:2:4), the only sparsity that GPUs multiply"

    def decide(self, program: Program, manifest: Mapping[str, Any] | None = None) -> list[Decision]:
        found = [_without_experts(d) for d in super().decide(program, manifest)]
        self.groups = siblings(found)
        alone = {d.name for d in found if d.site is not None} - {name for group in self.groups for name in group}
        self.groups += [[d.name] for d in found if d.name in alone]
        device = current_gpu()
        if device is not None and self.tune:
            found = self._measured(found, device)
        return found

    def _measured(self, found: list[Decision], device: torch.device) -> list[Decision]:
        """What this machine's GPU says of each group's shape: those that it multiplies faster dense stay dense."""
        gpu, policy = GPU.of(device), self.policy
        by_name = {d.name: d for d in found}
        for number, group in enumerate(self.groups):
            report(Progress("timing kernels", number, len(self.groups), group[0]))
            members = [by_name[name] for name in group]
            dtype = self.weights.dtype(group[0])
            if gpu.unfit(dtype) is not None or (not gpu.compiler and policy != "prefill"):
                continue
            rows, columns = sum(d.linear.shape[0] for d in members), members[0].linear.shape[1]
            timings = timings_of(rows, columns, dtype, policy, gpu.library_for(policy), device)
            for d in members:
                self.timings[d.name] = timings
                if not timings.pays(policy):
                    by_name[d.name] = d.left_dense(f"dense is faster on {gpu.name} ({timings.verdict(policy)})")
        return list(by_name.values())

    def finish(self, program: Program, manifest: dict[str, Any]) -> tuple[Path, Weights]:
        self.rounded = any(run.get("rounded") for run in manifest.get("passes", ()))
        return super().finish(program, manifest)

    def extras(self) -> dict[str, object]:
        return {"gpu": self.options()}

    def edit(self, model: nn.Module) -> None:
        super().edit(model)
        prepare(model, tune=False, target=_ANY)

    def records(self) -> list[dict[str, Any]]:
        return [
            d.as_dict()
            | {"gpu": {"plan": self._plan(d), "measured_us": self._micro(d)} if d.site is not None else None}
            for d in self.decisions
        ]

    def _micro(self, d: Decision) -> dict[str, dict[str, float]]:
        timings = self.timings.get(d.name)
        return {} if timings is None else {str(t): dict(times) for t, times in timings.micro.items()}

    def _plan(self, d: Decision) -> str:
        """Where it was measured, that; else the default for the shape that it is multiplied in."""
        timings = self.timings.get(d.name)
        if timings is not None:
            return str(timings.plan())
        group = next(g for g in self.groups if d.name in g)
        rows = sum(other.linear.shape[0] for other in self.decisions if other.name in group)
        return str(default_plan(rows, d.linear.shape[1], self.policy, _ANY.library_for(self.policy)))

    def notes(self) -> list[str]:
        if self.unpacked is not None:
            return super().notes()
        first, *rest = summary(self.decisions)
        lines = [*self.hf.notes(), first, *kernels_by_tokens(self.decisions, self.groups, self._plan, self.timings)]
        packed = [d.name for d in self.decisions if d.site is not None]
        if packed and self.weights.dtype(packed[0]) not in DTYPES:
            lines.append("stored in float32, which no 2:4 kernel takes: load it with dtype=torch.bfloat16")
        if not self.timings:
            why = "tune=false" if current_gpu() is not None else "no GPU here"
            later = "measures once per shape" if self.tune else "takes them too"
            lines.append(f"{why}: nothing was measured, these are built-in defaults; a loader on a GPU {later}")
        if self.rounded:
            lines.append(
                "rounded weights keep the width of their dtype; --to packed stores them in few bits, for GPUs too"
            )
        loading = 'load it with `import sparsify` and from_pretrained(OUT, device_map="cuda")'
        return [*lines, *rest[:-1], f"{loading}; sparsify bench OUT --device cuda measures it"]


def _without_experts(d: Decision) -> Decision:
    return d if d.site is None or d.site.experts is None else d.left_dense(NO_EXPERTS)
