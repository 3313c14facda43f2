"""``compile()``: the one function behind the command line. Model in; passes in the order given; output out."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.analysis import find_sites
from sparsify.analysis.linear import Opaque
from sparsify.backend import Backend
from sparsify.calibration.data import Calibration, example_batch, load_calibration
from sparsify.calibration.statistics import GRADIENTS
from sparsify.capture import Batch, capture
from sparsify.checkpoint import MemoryStore
from sparsify.engine import Schedule, prune
from sparsify.errors import SpecError, near
from sparsify.manifest import make_manifest
from sparsify.program import Program
from sparsify.pruning import Observer, SiteResult
from sparsify.restructured import Restructured
from sparsify.smaller import Smaller
from sparsify.source import Source, build_skeleton, open_source, require_real
from sparsify.spec import AnyPass, parse_backend, parse_pass, spec_text
from sparsify.staging import check_output
from sparsify.structural import StructuralPass
from sparsify.targets import Skipped, Target, choose
from sparsify.weight_pass import WeightPass
from sparsify.weights import Weights

SCHEDULES = ("layer", "block", "dense")


@dataclass
class PassRun:
    """One pass: what it was to prune and, once it ran, what happened."""

    weight_pass: WeightPass
    schedule: str
    targets: list[Target]
    skipped: list[Skipped]
    sites: list[SiteResult] = field(default_factory=list)

    @property
    def kept(self) -> float:
        """Fraction of the weights of the pruned sites that are not zero."""
        sizes = [math.prod(site.shape) for site in self.sites]
        return sum(s.kept * n for s, n in zip(self.sites, sizes, strict=True)) / max(1, sum(sizes))


@dataclass
class Compiled:
    """The result of :func:`compile`.

    Attributes:
        runs: one per pass, in order. ``calibration``: None where no data was used. ``opaque``: contractions with
            a parameter that no pass can prune. ``output``: the folder that was written, or None; ``notes``: what the
            backend says of it. ``structure``: what structural passes took out, before ``runs``; ``source`` is the
            smaller model then.
    """

    source: Source
    program: Program
    runs: list[PassRun]
    calibration: Calibration | None
    opaque: list[Opaque]
    seed: int = 0
    ignore: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    output: Path | None = None
    notes: list[str] = field(default_factory=list)
    structure: list[Restructured] = field(default_factory=list)
    # Whoever owns the folder of a smaller model that was not written to an output.
    kept: Any = field(default=None, repr=False)

    @property
    def manifest(self) -> dict[str, Any]:
        return make_manifest(self)

    def weight(self, name: str) -> Tensor:
        """A parameter as it is after the passes, by its name in the model or in the checkpoint."""
        weights = self.program.weights
        if name in weights:
            return weights.read(name)
        if name in set(weights.store.names()):
            return weights.store.read(name)
        raise SpecError(f"weight {name}", found="no such parameter", do=near(name, weights.parameters()))

    @property
    def model(self) -> nn.Module:
        """The pruned model: a copy of a module given in Python, sharing what was not pruned; else built anew."""
        pruned = {name for run in self.runs for site in run.sites for name in site.written}
        return materialize(self.source, self.program.weights, pruned)


@dataclass(frozen=True)
class _Plan:
    """What is to be done to a model, whatever the shape of the batches."""

    source: Source
    passes: list[WeightPass]
    schedule: str
    ignore: tuple[str, ...]
    only: tuple[str, ...]

    structure: Sequence[Restructured] = ()

    def compiled(self, batch: Batch, device: torch.device, seed: int) -> Compiled:
        """Trace the model at the shapes of ``batch`` and decide what each pass prunes; nothing has run yet."""
        program = capture(self.source, batch, device)
        sites, opaque = find_sites(program)
        runs = [
            PassRun(p, self.schedule, *choose(program, sites, p.pattern, ignore=self.ignore, only=self.only))
            for p in self.passes
        ]
        structure = list(self.structure)
        return Compiled(
            self.source, program, runs, None, opaque, seed, self.ignore, self.only, structure=structure
        )  # fmt: skip

    def run(
        self, calibration: Any, backend: Backend, out: Path | None, *, samples: int | None, sequence_length: int | None,
        seed: int, memory: int, device: torch.device, overwrite: bool, dry_run: bool, observe: Observer,
    ) -> Compiled:  # fmt: skip
        """Weight passes, and the output."""
        source = self.source
        needs_data = any(p.needs_data for p in self.passes) or calibration is not None
        one_by_one = any(GRADIENTS & set(p.statistics) for p in self.passes)
        named = calibration is None or isinstance(calibration, str)
        data = None
        if needs_data and not named:
            data = load_calibration(calibration, source, samples=samples, one_by_one=one_by_one)
        plan = self if needs_data else replace(self, schedule="none")
        compiled = plan.compiled(data.batches[0] if data else example_batch(source), device, seed)
        if needs_data and named and not dry_run:
            # Only now, when all that can be refused has been: drawing data may take minutes. The graph of the plan goes
            # before that of the real shapes comes.
            del compiled
            data = load_calibration(
                calibration, source, samples=samples, sequence_length=sequence_length, seed=seed, one_by_one=one_by_one
            )
            compiled = plan.compiled(data.batches[0], device, seed)
        compiled.calibration = data
        program, runs = compiled.program, compiled.runs
        if dry_run:
            return compiled

        with ExitStack() as stack:
            if out is None:
                program.weights = source.weights.on(MemoryStore(source.weights.store))
            else:
                job = stack.enter_context(backend.open(source, out, overwrite=overwrite, program=program))
                program.weights = job.weights
            for run in runs:
                run.sites = prune(
                    program, run.weight_pass, run.targets, None if data is None else data.batches,
                    schedule=self.schedule,  # type: ignore[arg-type]
                    dense=source.weights, labels=None if data is None else data.labels,
                    memory=memory, device=device, observe=observe,
                )  # fmt: skip
                program.verify()
            if out is not None:
                # The folder has its final name only now; weights are read from there from here on.
                compiled.output, program.weights = job.finish(program, make_manifest(compiled))
                compiled.notes = job.notes()
        return compiled


def compile(
    model: str | Path | nn.Module,
    passes: Sequence[str | AnyPass] = (),
    *,
    calibration: str | Iterable[Any] | Calibration | None = None,
    schedule: Schedule = "layer",
    output: str | Path | None = None,
    to: str | Backend = "hf",
    samples: int | None = None,
    sequence_length: int | None = None,
    seed: int = 0,
    ignore: Sequence[str] = (),
    only: Sequence[str] = (),
    device: str = "auto",
    memory: int | str = "8GiB",
    overwrite: bool = False,
    allow_bin: bool = False,
    trust_remote_code: bool = False,
    dry_run: bool = False,
    observe: Observer = lambda progress: None,
) -> Compiled:
    """Prune ``model`` and write the result.

    Args:
        model: a Hugging Face folder, a hub id, or a module, which is left as it is.
        passes: specs (``"wanda:2:4"``) or pass objects, run in this order, each on the result of the one before.
        calibration: a source's name (see README), or an iterable of LongTensors [batch, sequence] or of keyword
            dictionaries of the model's inputs, or what :func:`load_calibration` returned. None: C4 where the hub
            answers, else sampled from the model.
        schedule: ``layer``, ``block`` (the papers') or ``dense``; see :mod:`sparsify.engine`.
        to: the backend, as a spec (``"onnx:weights=packed"``) or an object: what to write.
        output: the folder to write; None keeps the result in memory.
        samples, sequence_length, seed: how sequences are drawn from a named source.
        ignore, only: names, globs or ``re:`` patterns of parameters or modules.
        memory: bytes of activations kept in memory, as a number or as "8GiB".
        dry_run: decide what would be pruned and stop there.

    Raises:
        SparsifyError: see :mod:`sparsify.errors`; nothing is written then.

    >>> import torch, sparsify
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> pruned = sparsify.compile(net, ["wanda:2:4"], calibration=[torch.randn(16, 8)])
    >>> int((pruned.model[0].weight != 0).sum())
    32
    """
    everything = [parse_pass(p) if isinstance(p, str) else p for p in passes]
    structural, parsed = _in_order(everything)
    if schedule not in SCHEDULES:
        raise SpecError(f"schedule '{schedule}'", found="no such schedule", do=f"Choose {', '.join(SCHEDULES)}")
    backend = parse_backend(to) if isinstance(to, str) else to
    if not everything and backend.needs_pass:
        raise SpecError("compiling without a pass", found="nothing to do", do="Give --pass, e.g. --pass wanda:2:4")
    budget, place = parse_bytes(memory), resolve_device(device)
    out = Path(output) if output is not None else None
    if out is not None and not dry_run:
        local = Path(model) if not isinstance(model, nn.Module) and Path(model).exists() else None
        check_output(out, overwrite=overwrite, source=local)
    source = open_source(model, allow_bin=allow_bin, trust_remote_code=trust_remote_code)
    if isinstance(model, nn.Module):
        require_real(model)
    with ExitStack() as stack:
        smaller = None
        if structural:
            smaller = stack.enter_context(Smaller(source, structural, ignore, only))
            if dry_run:
                program = capture(source, example_batch(source), place)
                return Compiled(source, program, [], None, [], seed, structure=smaller.planned())
            drawn = smaller.calibration(calibration, samples=samples, sequence_length=sequence_length, seed=seed)
            calibration = calibration if drawn is None else drawn
            source = smaller.cut(drawn, memory=budget, device=place, seed=seed, observe=observe)
        plan = _Plan(
            source, parsed, schedule, tuple(ignore), tuple(only), [] if smaller is None else smaller.done
        )  # fmt: skip
        compiled = plan.run(
            calibration, backend, out, samples=samples, sequence_length=sequence_length, seed=seed, memory=budget,
            device=place, overwrite=overwrite, dry_run=dry_run, observe=observe,
        )  # fmt: skip
        if smaller is not None and out is None:
            compiled.kept = smaller.detach()
        return compiled


def _in_order(passes: Sequence[AnyPass]) -> tuple[list[StructuralPass], list[WeightPass]]:
    """Structural passes, which come first, and the others.

    Raises:
        SpecError: a structural pass after a weight pass.
    """
    structural = [p for p in passes if isinstance(p, StructuralPass)]
    others = [p for p in passes if not isinstance(p, StructuralPass)]
    if any(isinstance(p, StructuralPass) for p in passes[len(structural) :]):
        raise SpecError(
            f"{structural[-1].name} after {others[0].name}", found="weights pruned before the model gets smaller",
            do="Give structural passes first",
        )  # fmt: skip
    return structural, others


def default_output(source_name: str, passes: Sequence[str], to: str = "hf") -> Path:
    """``NAME-PASS[-BACKEND]`` in the current folder: ``llama-wanda-2-4``, ``llama-onnx``."""
    backend = parse_backend(to).name
    spec = "-".join([spec_text(parse_pass(p)) for p in passes] + ([backend] if backend != "hf" else []))
    safe = spec.replace("%", "pct")
    return Path(f"{source_name}-{''.join(c if c.isalnum() or c in '._' else '-' for c in safe)}")


def materialize(source: Source, weights: Weights, changed: set[str]) -> nn.Module:
    """A module with the parameters of ``weights``; of a module in memory only ``changed`` ones are new."""
    if source.folder is not None:
        dtype = next((p.dtype for p in source.module.parameters() if p.is_floating_point()), None)
        model = build_skeleton(source.folder, source.trust_remote_code, dtype)
        changed = {weights.canonical(n) for n, _ in model.named_parameters()} | {
            weights.canonical(n) for n, _ in model.named_buffers() if weights.canonical(n) in weights
        }
    else:
        kept = {id(t): t for t in (*source.module.parameters(), *source.module.buffers())}
        model = copy.deepcopy(source.module, memo=dict(kept))
    fresh: dict[str, nn.Parameter] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, old in [*module._parameters.items(), *module._buffers.items()]:
            full = weights.canonical(f"{prefix}.{name}" if prefix else name)
            if old is None or full not in changed or full not in weights:
                continue
            if full not in fresh:
                value = weights.read(full).to(device="cpu" if source.folder else old.device, dtype=old.dtype)
                fresh[full] = nn.Parameter(value, requires_grad=value.is_floating_point() and old.requires_grad)
            if name in module._parameters:
                module._parameters[name] = fresh[full]
            else:
                module._buffers[name] = fresh[full].data
    return model


def parse_bytes(text: int | str) -> int:
    """``"8GiB"``, ``"500MB"`` or a number, in bytes.

    Raises:
        SpecError: not an amount of memory.
    """
    if isinstance(text, int):
        return text
    units = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40, "KB": 10**3, "MB": 10**6,
             "GB": 10**9, "TB": 10**12}  # fmt: skip
    digits = text.strip().rstrip("BbiIKkMmGgTt ")
    unit = text.strip()[len(digits) :].strip().upper()
    try:
        if unit in units and float(digits) >= 0:
            return int(float(digits) * units[unit])
    except ValueError:
        pass
    raise SpecError(f"memory '{text}'", found="not an amount of memory", do="Write 8GiB or 500MB, say")


def resolve_device(text: str) -> torch.device:
    """``auto`` is CUDA where there is one.

    Raises:
        SpecError: no such device here.
    """
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SpecError(f"device '{text}'", found="no such device on this machine", do="Use auto or cpu") from error
    return device
