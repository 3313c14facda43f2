"""``sparsify verify``: what an exported folder really holds, weight by weight, and what each runtime gains from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
from torch import Tensor

from sparsify.backends.onnx.products.bodies import DOMAIN
from sparsify.backends.onnx.running.session import find_onnx
from sparsify.backends.onnx.storage.store import GraphStore
from sparsify.backends.verify.axis import SummedAxis, summed_axes
from sparsify.backends.verify.content import check_content, check_numbers, differs
from sparsify.backends.verify.equality import check_equal, either_way
from sparsify.backends.verify.judge import judge
from sparsify.backends.verify.outputs.behaviour import check_behaviour
from sparsify.backends.verify.promises import promises
from sparsify.backends.verify.result import Verification
from sparsify.context import Progress, counted, report
from sparsify.errors import CheckpointError, first_line
from sparsify.files.checkpoint import INDEX, WEIGHTS
from sparsify.files.ledger import Ledger
from sparsify.files.manifest import MANIFEST, section
from sparsify.finite import infinities_allowed, scan
from sparsify.frontend.skeleton import DTYPES
from sparsify.frontend.stores import open_store
from sparsify.ir.store import TensorStore
from sparsify.method.pattern import Pattern, parse_pattern
from sparsify.tensors import digest
from sparsify.words import WEIGHT_DTYPE


def verify_onnx(
    folder: Path,
    *,
    against: Path | None = None,
    pattern: str | None = None,
    run: bool = True,
) -> Verification:
    """Check an ONNX file or folder, ours or not.

    Args:
        against: a checkpoint folder to compare with; the folder's own where None.
        pattern: what every pruned weight must hold; else what ``sparsify.json`` promises for each.
        run: compare outputs and greedy tokens with torch, for which the whole model is loaded.

    Raises:
        CheckpointError: no ONNX file there. What is wrong with the file itself is in ``problems``.
    """
    file = find_onnx(folder)
    ledger = Ledger.of(file.parent)
    manifest = ledger.manifest
    store = GraphStore(file)
    result = Verification(
        file, opset=store.model.opset_imports.get("", 0), packed=bool(store.packed), sparse=bool(store.sparse)
    )
    report(Progress("checking", what=file.name))
    _check_file(result, store)
    equal = check_content(result, file.parent, ledger) if manifest else {}
    readable = _check_patterns(result, store, ledger, equal, parse_pattern(pattern) if pattern else None)
    # The folder's own tensors were compared already; those of another one are held against its list as they are read.
    listed = Ledger() if against is None else Ledger.of(against)
    checkpoint = _checkpoint(against or file.parent, listed, result, section(manifest, "quantized_source").get("dtype"))
    if not readable:
        result.unchecked.append("runtime: some weights cannot be read, so nothing was run")
        return result
    report(Progress("comparing with onnxruntime", what="weights"))
    check_equal(result, store, ledger, checkpoint)
    if run and not result.problems:
        report(Progress("running onnxruntime and torch", what=file.name))
        check_behaviour(result, store, checkpoint, against or file.parent, manifest)
    elif run:
        result.unchecked.append("outputs: not compared, for the weights are already known to be wrong")
    else:
        result.unchecked.append("outputs: not compared, as asked")
    return result


def _check_file(result: Verification, store: GraphStore) -> None:
    try:
        onnx.checker.check_model(str(store.file), full_check=True)
    except Exception as error:  # the checker's kinds are its own
        result.problems.append(f"{store.file.name}: onnx.checker refuses it: {first_line(error)}")
    links = [p.name for p in store.file.parent.iterdir() if p.is_symlink() or (p.is_file() and p.stat().st_nlink > 1)]
    if links:
        result.problems.append(f"links in the folder, which runtimes refuse: {', '.join(sorted(links)[:3])}")
    strange = sorted({n.domain for n in store.model.graph.all_nodes() if n.domain not in ("", "ai.onnx", DOMAIN)})
    if strange:
        result.unchecked.append(f"operators of {', '.join(strange)}: only runtimes that know these load the file")


def _check_patterns(
    result: Verification, store: GraphStore, ledger: Ledger, equal: Mapping[str, bool], asked: Pattern | None
) -> bool:
    """Fill in ``result.weights``; whether every tensor could be read. ``equal``: what is known of some already."""
    promised = promises(ledger.manifest)
    found, lost = summed_axes(store.model, store.packed)
    result.unchecked += lost
    readers: dict[str, list[SummedAxis]] = {}
    for summed in found:
        readers.setdefault(summed.name, []).append(summed)
    # Matrices in the graph itself may be masks that forbid by minus infinity.
    inline = set(store.inline())
    names = {*store.names(), *inline}
    result.unchecked += [f"{name}: {kind} data, which is not looked at" for name, kind in store.foreign().items()]
    readable = True
    # What contractions read first, in their order: that of the report.
    for name in counted("reading weights", dict.fromkeys([*(n for n in readers if n in names), *sorted(names)])):
        try:
            weight = store.read(name)
        except CheckpointError as error:
            result.problems.append(str(error))
            readable = False
            continue
        # What lies in safetensors was looked at there, under the same name.
        if name not in equal:
            check_numbers(
                result, {name: scan(weight, infinities_allowed(name) or name in inline)}, {name: weight.shape}, ledger
            )
        written = equal.get(name, True)
        if name in ledger.tensors and name not in equal and not _is_written(weight, ledger, name):
            written = False
            result.problems.append(differs(name))
        if weight.is_floating_point() and weight.dim() >= 2:
            for at in readers.get(name, ()):
                if not 0 <= at.axis < weight.dim():
                    result.problems.append(f"{name}: {at.operator} sums over axis {at.axis} of {weight.dim()}")
                    continue
                check = judge(result, at, weight, store.label(name), promised.get(name), asked)
                check.equal = None if written else False
                result.weights.append(check)
    seen = readers.keys() & names
    part = section(ledger.manifest, "onnx").get("part")
    outside: list[str] = []
    for name in sorted(promised.keys() - seen):
        if name in names:
            result.unchecked.append(f"{name}: the graph does not show one axis that it is summed over")
        elif part is not None:
            outside.append(name)
        else:
            result.problems.append(f"{name}: {MANIFEST} says it was pruned, and the graph does not hold it")
    if outside:
        result.unchecked.append(
            f"{len(outside)} pruned weights are not in the graph, which is the {part} alone: {outside[0]}…"
        )
    return readable


def _is_written(weight: Tensor, ledger: Ledger, name: str) -> bool:
    """Whether ``weight`` is what was written."""
    return ledger.tensors[name] in (digest(way, ledger.algorithm) for way in either_way(weight))


def _checkpoint(folder: Path, ledger: Ledger, result: Verification, dtype: object) -> TensorStore | None:
    """The tensors to compare with; those of a quantized folder in ``dtype``, in which its model was written."""
    if not (folder / WEIGHTS).exists() and not (folder / INDEX).exists():
        return None
    try:
        return open_store(folder, ledger, DTYPES.get(str(dtype), DTYPES[WEIGHT_DTYPE]))
    except CheckpointError as error:
        result.problems.append(str(error))
        return None
