"""``sparsify verify`` of a folder without a graph: a checkpoint's patterns, along the axes of its model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sparsify.analysis.linear import LinearSite, find_sites
from sparsify.backends.packed.store import open_packed
from sparsify.backends.verify.axis import SummedAxis
from sparsify.backends.verify.content import check_content
from sparsify.backends.verify.judge import judge
from sparsify.backends.verify.promises import promises
from sparsify.backends.verify.result import Verification
from sparsify.context import counted
from sparsify.data.batches import example_batch
from sparsify.errors import CheckpointError, SparsifyError
from sparsify.files.checkpoint import Checkpoint
from sparsify.files.ledger import Ledger
from sparsify.frontend.capture import capture
from sparsify.frontend.source import open_source
from sparsify.method.pattern import Pattern, parse_pattern


def verify_checkpoint(folder: Path, *, pattern: str | None = None) -> Verification:
    """Check a Hugging Face folder: every tensor and every other file of it, and each pruned weight's pattern.

    Raises:
        CheckpointError, TraceError: no sound folder, or no graph to find the axes in.
    """
    ledger = Ledger.of(folder)
    result = Verification(folder)
    # Checksums are of what lies in the files, patterns of the weights that a packed folder unpacks to.
    equal = check_content(result, folder, ledger)
    try:
        _check_patterns(result, folder, ledger, equal, parse_pattern(pattern) if pattern else None)
    except SparsifyError as error:
        if not result.problems:
            raise
        result.problems.append(str(error))
    return result


def _check_patterns(
    result: Verification, folder: Path, ledger: Ledger, equal: Mapping[str, bool], asked: Pattern | None
) -> None:
    # What differs is known by now: here it is looked at all the same.
    packed = open_packed(folder, Ledger())
    source = open_source(folder, check=False, allow_nan=True)
    # Of a quantized folder, patterns are of the dense weights.
    store = packed or (Checkpoint(folder) if source.quantization is None else source.weights.store)
    program = capture(source, example_batch(source))
    sites, opaque = find_sites(program)
    promised = promises(ledger.manifest)
    result.unchecked += [f"{', '.join(o.parameters)}: {o.reason}" for o in opaque]
    once = {site.parameter: site for site in sites}
    for parameter in counted("reading weights", once):
        site = once[parameter]
        if site.window is not None:
            result.unchecked.append(f"{site.name}: a convolution with a kernel has no one axis of inputs")
            continue
        for name in program.weights.sources(site.parameter):
            try:
                weight = store.read(name)
            except CheckpointError as error:
                result.problems.append(str(error))
                continue
            at = SummedAxis(name, _axis(site, weight.dim()), "linear", site.expert_axis is None)
            form = packed.sites[name].label if packed is not None and name in packed.sites else "dense"
            check = judge(result, at, weight, form, promised.get(name), asked)
            check.equal = equal.get(name)
            result.weights.append(check)


def _axis(site: LinearSite, rank: int) -> int:
    """The axis of inputs in a checkpoint tensor: experts that lie apart there have no axis of experts."""
    apart = site.expert_axis is not None and rank == 2
    return site.in_axis - int(apart and site.expert_axis is not None and site.expert_axis < site.in_axis)
