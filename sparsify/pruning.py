"""One weight's turn: read it, prune each of its matrices, check the promise, store it, and say what happened."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsify.calibration.recorder import GroupRecorder
from sparsify.calibration.statistics import InputStatistics
from sparsify.errors import CalibrationError, SparsifyError
from sparsify.finite import all_finite
from sparsify.program import Program
from sparsify.targets import Target
from sparsify.verify import verify_pruned
from sparsify.weight_pass import WeightPass


@dataclass
class SiteResult:
    """What happened at one site.

    Attributes:
        kept: fraction of weights that are not zero. ``error``: ‖XWᵀ−XŴᵀ‖/‖XWᵀ‖ over the calibration tokens, None
            where nothing was measured; of a pass fitted to the dense model ‖X₀Wᵀ−XŴᵀ‖/‖X₀Wᵀ‖, X₀ the
            dense model's input.
        ``without_data``: experts that no token reached. ``notes``: what a pass had to do that a user should know.
        ``written``: the parameters that changed, the bias among them where the pass changed that too.
    """

    name: str
    kind: str
    parameter: str
    shape: tuple[int, ...]
    pattern: str
    kept: float
    error: float | None
    seconds: float
    tokens: int
    sources: list[str]
    without_data: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)


@dataclass
class Progress:
    """What an observer is told: after a batch of a region (``site`` None), and after each site is pruned.

    ``tokens`` are those of the batch that just left a region; every token leaves every region once.
    """

    regions_done: int
    regions: int
    label: str
    tokens: int
    site: SiteResult | None = None


Observer = Callable[[Progress], None]


def prune_without_data(
    program: Program, weight_pass: WeightPass, targets: Sequence[Target], observe: Observer
) -> list[SiteResult]:
    """Prune every target by its weights alone; nothing is run."""
    results = []
    for number, target in enumerate(targets):
        result, _ = prune_target(program, weight_pass, target)
        results.append(result)
        observe(Progress(number + 1, len(targets), target.site.name, 0, result))
    return results


def prune_target(
    program: Program,
    weight_pass: WeightPass,
    target: Target,
    recorder: GroupRecorder | None = None,
    sequences: int = 0,
    own: Mapping[str, Tensor] | None = None,
    device: torch.device | None = None,
) -> tuple[SiteResult, tuple[Tensor, Tensor]]:
    """Prune one parameter, verify it, store it; returns the result and the parameter before and after.

    Args:
        recorder: what was recorded of the input; None without data.
        own: statistics of the weight itself by name, [experts, out_features, in_features].
    """
    started = time.perf_counter()
    site, weights = target.site, program.weights
    stored = weights.read(target.parameter).to(device or "cpu")
    if not all_finite(stored):
        raise CalibrationError(
            f"weight {target.parameter}",
            found="it holds NaN or infinity",
            do="Mend the checkpoint before pruning it",
        )
    before = site.matrices(stored)
    after = before.clone()
    tokens = [0] * site.experts if recorder is None else recorder.tokens
    unseen = [e for e, t in enumerate(tokens) if weight_pass.statistics and t == 0]
    if unseen and site.expert_axis is None:
        raise CalibrationError(
            f"the input of {site.name}",
            found="no calibration token reaches it",
            do="Use other calibration data",
        )
    bias = weights.read(site.bias).to(stored.device) if site.bias is not None else None
    notes, written = list[str](), [target.parameter]
    for expert in range(site.experts):
        method = weight_pass.without_data() if expert in unseen else weight_pass
        statistics = _statistics(recorder, expert, sequences, own, bias, site.parameter)
        try:
            pruned = method.prune(before[expert], statistics)
        except SparsifyError as error:
            raise type(error)(f"{error.asked} of {site.name}", found=error.found, do=error.do) from error
        verify_pruned(site.name, method, before[expert], pruned)
        after[expert] = pruned.weight.to(after.dtype)
        notes += [f"expert {expert}: {note}" if site.experts > 1 else note for note in pruned.notes]
        if pruned.bias is not None and site.bias is not None and bias is not None and target.sources is None:
            weights.write(site.bias, pruned.bias.to(bias.dtype).cpu(), None)
            written.append(site.bias)
    layout = site.layout(after, stored)
    weights.write(target.parameter, layout.cpu(), set(target.sources) if target.sources is not None else None)
    if target.sources is not None:
        # Only some checkpoint tensors of the stack were changed; what counts is what is there now.
        layout = weights.read(target.parameter).to(stored.device)
        after = site.matrices(layout)
    result = SiteResult(
        name=site.name,
        kind=site.kind,
        parameter=target.parameter,
        shape=tuple(stored.shape),
        pattern=str(weight_pass.pattern),
        kept=float((after != 0).sum()) / after.numel(),
        error=None if recorder is None else recorder.sketch.relative_error(before, after),
        seconds=time.perf_counter() - started,
        tokens=sum(tokens),
        sources=sorted(target.sources or weights.sources(target.parameter)),
        without_data=unseen,
        notes=notes,
        written=written,
    )
    return result, (stored, layout)


def _statistics(
    recorder: GroupRecorder | None,
    expert: int,
    sequences: int,
    own: Mapping[str, Tensor] | None,
    bias: Tensor | None,
    parameter: str,
) -> InputStatistics:
    found = InputStatistics({}, 0, 0) if recorder is None else recorder.statistics(expert, sequences)
    values = {name: value[expert] for name, value in (own or {}).items()}
    if recorder is not None and parameter in recorder.outputs:
        values |= recorder.outputs[parameter].values(expert)
    # ``derived`` stays the same object: what one site derives from the input, its siblings find.
    return dataclasses.replace(found, values={**found.values, **values}, bias=bias)
