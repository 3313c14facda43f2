"""The backend ``cuda``: a packed folder whose 2:4 weights a GPU runs on its sparse tensor cores."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from sparsify.backends.cuda.report import kernels_by_tokens
from sparsify.backends.packed.backend import PackedJob, check_source
from sparsify.backends.packed.loaded.prepare import prepare
from sparsify.backends.packed.plan import Decision, decide, siblings, summary
from sparsify.errors import SpecError
from sparsify.frontend.source import Source
from sparsify.ir.program import Program
from sparsify.runtime.cuda.dispatch import POLICIES, Policy, Timings, default_plan
from sparsify.runtime.cuda.fragments import DTYPES
from sparsify.runtime.cuda.prepared import Target, current_gpu, timings_of

# What a model is traced for where there is no GPU: nothing of it but "it has a compiler and sparse tensor cores"
# counts.
_ANY = Target("any GPU", (9, 0), 132, True, None)


@dataclass(frozen=True)
class CudaBackend:
    """The backend ``cuda``.

    Attributes:
        policy: which copies of a weight lie in GPU memory. ``decode``: one for few tokens (0.56 of the dense bytes),
            which serves many through a dense copy of one layer at a time; ``prefill``: one for many (0.56); ``both``:
            two (1.13).
        tune: measure the kernels, once per shape and GPU: here where a GPU is, and wherever the folder is loaded on
            one; else built-in defaults choose.
    """

    policy: Policy = "decode"
    tune: bool = True

    name: ClassVar[str] = "cuda"
    needs_pass: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise SpecError(f"--to cuda:policy={self.policy}", found="no such policy", do=f"Take {', '.join(POLICIES)}")

    def open(self, source: Source, out: Path, *, overwrite: bool, program: Program) -> CudaJob:
        check_source(source)
        return CudaJob(self, source, out, overwrite)


class CudaJob(PackedJob):
    """One output folder, packed for GPUs.

    Raises:
        BackendError: no weight is 2:4, or the folder cannot be written.
    """

    advice = "Prune it to 2:4 first (--pass wanda:2:4), the only sparsity that GPUs multiply"

    def decide(self, program: Program) -> list[Decision]:
        found = decide(program, self.weights, self.source.module, "packed24", "smallest")
        found = [self._without_experts(d) for d in found]
        self.timings: dict[str, Timings] = {}
        self.groups = siblings(found)
        alone = {d.name for d in found if d.site is not None} - {name for group in self.groups for name in group}
        self.groups += [[d.name] for d in found if d.name in alone]
        device = current_gpu()
        if device is not None and self.backend.tune:
            found = self._measured(found, device)
        return found

    def _without_experts(self, d: Decision) -> Decision:
        if d.site is None or d.site.experts is None:
            return d
        return replace(
            d, site=None, nbytes=d.dense_bytes, reason="a stack of experts, for which there is no GPU kernel"
        )

    def _measured(self, found: list[Decision], device: torch.device) -> list[Decision]:
        """What this machine's GPU says of each group's shape: those that it multiplies faster dense stay dense."""
        target, policy = Target.of(device), self.backend.policy
        library = target.library if policy != "decode" else None
        by_name = {d.name: d for d in found}
        for group in self.groups:
            members = [by_name[name] for name in group]
            dtype = self.weights.dtype(group[0])
            if target.unfit(dtype) is not None or (not target.compiler and policy != "prefill"):
                continue
            rows, columns = sum(d.linear.shape[0] for d in members), members[0].linear.shape[1]
            timings = timings_of(rows, columns, dtype, policy, library, device)
            for d in members:
                self.timings[d.name] = timings
                if not timings.pays(policy):
                    why = f"dense is faster on {target.name} ({timings.verdict(policy)})"
                    by_name[d.name] = replace(d, site=None, nbytes=d.dense_bytes, reason=why)
        return list(by_name.values())

    def extras(self) -> dict[str, Any]:
        return {"gpu": asdict(self.backend)}

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
        library = "cusparselt" if self.backend.policy != "decode" else None
        return str(default_plan(rows, d.linear.shape[1], self.backend.policy, library))

    def notes(self) -> list[str]:
        first, *rest = summary(self.decisions)
        lines = [first, *kernels_by_tokens(self.decisions, self.groups, self._plan, self.timings)]
        packed = [d.name for d in self.decisions if d.site is not None]
        if packed and self.weights.dtype(packed[0]) not in DTYPES:
            lines.append("stored in float32, which no 2:4 kernel takes: load it with dtype=torch.bfloat16")
        if not self.timings:
            why = "tune=false" if current_gpu() is not None else "no GPU here"
            later = "measures once per shape" if self.backend.tune else "takes them too"
            lines.append(f"{why}: nothing was measured, these are built-in defaults; a loader on a GPU {later}")
        loading = 'load it with `import sparsify` and from_pretrained(OUT, device_map="cuda")'
        return [*lines, *rest[:-1], f"{loading}; sparsify bench OUT --device cuda measures it"]
