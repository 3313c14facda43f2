"""``sparsify verify``: what an exported folder really holds, weight by weight, and what each runtime gains from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.backends.onnx.pack import as_bits
from sparsify.backends.onnx.runner import find_onnx
from sparsify.backends.onnx.store import GraphStore
from sparsify.backends.verify.axis import Contraction, contractions
from sparsify.backends.verify.behaviour import behave, runtime_weights, torch_model
from sparsify.backends.verify.result import Verification, WeightCheck
from sparsify.errors import BackendError, CheckpointError, SparsifyError, first_line
from sparsify.files.checkpoint import INDEX, WEIGHTS, Checkpoint
from sparsify.files.manifest import MANIFEST, read_manifest
from sparsify.ir.store import TensorStore
from sparsify.method.pattern import NM, Pattern, parse_pattern
from sparsify.tensors import checksum

# Patterns that are looked for where none is promised.
_KNOWN = (NM(1, 4), NM(2, 4), NM(4, 8))
# Of the logits' own size; the arithmetic is the same, its order is not.
_TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


def verify_onnx(
    folder: Path,
    *,
    against: Path | None = None,
    pattern: str | None = None,
    run: bool = True,
    observe: Callable[[str], None] = lambda stage: None,
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
    store = GraphStore(file)
    result = Verification(file, opset=store.model.opset_imports.get("", 0), packed=bool(store.packed))
    manifest = read_manifest(file.parent)
    observe("checking the file")
    _check_file(result, store)
    observe("reading the weights")
    readable = _check_patterns(result, store, manifest, parse_pattern(pattern) if pattern else None)
    checkpoint = _checkpoint(against or file.parent, result)
    if not readable:
        result.unchecked.append("runtime: some weights cannot be read, so nothing was run")
        return result
    observe("comparing weights with onnxruntime's")
    _check_equal(result, store, manifest, checkpoint)
    if run and not result.problems:
        observe("running onnxruntime and torch")
        _check_behaviour(result, store, checkpoint, against or file.parent, manifest)
    elif run:
        result.unchecked.append("outputs: not compared, for the weights are already known to be wrong")
    return result


def _check_file(result: Verification, store: GraphStore) -> None:
    import onnx

    try:
        onnx.checker.check_model(str(store.file), full_check=True)
    except Exception as error:  # the checker's kinds are its own
        result.problems.append(f"{store.file.name}: onnx.checker refuses it: {first_line(error)}")
    links = [p.name for p in store.file.parent.iterdir() if p.is_symlink() or (p.is_file() and p.stat().st_nlink > 1)]
    if links:
        result.problems.append(f"links in the folder, which runtimes refuse: {', '.join(sorted(links)[:3])}")
    strange = sorted({n.domain for n in store.model.graph.all_nodes() if n.domain not in ("", "ai.onnx")})
    if strange:
        result.unchecked.append(f"operators of {', '.join(strange)}: only runtimes that know these load the file")


def _check_patterns(result: Verification, store: GraphStore, manifest: dict[str, Any], asked: Pattern | None) -> bool:
    """Fill in ``result.weights``; whether every tensor could be read."""
    promised = promises(manifest)
    found, lost = contractions(store.model, store.packed)
    result.unchecked += [f"{what}" for what in lost]
    sums = manifest.get("checksums", {})
    readers: dict[str, list[Contraction]] = {}
    for contraction in found:
        readers.setdefault(contraction.name, []).append(contraction)
    names = {*store.names(), *store.inline()}
    readable = True
    # What contractions read first, in their order: that of the report.
    for name in dict.fromkeys([*(n for n in readers if n in names), *sorted(names)]):
        try:
            weight = store.read(name)
        except CheckpointError as error:
            result.problems.append(str(error))
            readable = False
            continue
        written = name not in sums or _sum_is(weight, sums[name])
        if not written:
            result.problems.append(f"{name}: its bytes are not those that were written (checksum of {MANIFEST})")
        if weight.is_floating_point() and weight.dim() >= 2:
            for at in readers.get(name, ()):
                check = judge(result, at, weight, store.packed.get(name, "dense"), promised.get(name), asked)
                check.equal = None if written else False
                result.weights.append(check)
    seen = readers.keys() & names
    for name in sorted(promised.keys() - seen):
        if name in names:
            result.unchecked.append(f"{name}: the graph does not show one axis that it is summed over")
        else:
            result.problems.append(f"{name}: {MANIFEST} says it was pruned, and the graph does not hold it")
    return readable


def _sum_is(weight: Tensor, crc: int) -> bool:
    """Whether ``weight`` has that checksum; a MatMul's weight may lie transposed."""
    return checksum(weight) == crc or (weight.dim() == 2 and checksum(weight.t()) == crc)


def judge(
    result: Verification,
    at: Contraction,
    weight: Tensor,
    stored: str,
    promise: Promise | None,
    asked: Pattern | None,
) -> WeightCheck:
    """Check one weight along the axis that is summed over; what is wrong goes to ``result.problems``."""
    moved = weight.movedim(at.axis, -1)
    zeros = float((weight == 0).float().mean())
    held = next((p for p in _KNOWN if zeros > 0.25 and _holds(moved, p)), None)
    expected = asked if asked is not None and zeros > 0.05 else promise.pattern if promise is not None else None
    check = WeightCheck(
        at.name, tuple(weight.shape), str(weight.dtype).removeprefix("torch."), stored,
        at.operator, at.axis, zeros, str(held) if held else None, tensorrt=_tensorrt(at, moved, held),
    )  # fmt: skip
    if isinstance(expected, NM):
        if not _holds(moved, expected):
            other = _other_axis(weight, at.axis, expected)
            result.problems.append(
                f"{at.name}: {expected} does not hold along axis {at.axis}, which {at.operator} sums over"
                + (f"; it holds along axis {other}: pruned along the wrong axis" if other is not None else "")
            )
        else:
            check.pattern = str(expected)
    elif promise is not None and zeros + 1e-6 < 1 - promise.kept:
        result.problems.append(f"{at.name}: {zeros:.4%} zeros, {MANIFEST} says {1 - promise.kept:.4%}")
    elif expected is None and held is None and zeros > 0.25:
        for known in _KNOWN:
            if (other := _other_axis(weight, at.axis, known)) is not None:
                result.problems.append(
                    f"{at.name}: {known} holds along axis {other}, but {at.operator} sums over axis {at.axis}: "
                    "pruned along the wrong axis"
                )
                break
    return check


def _holds(moved: Tensor, pattern: NM) -> bool:
    """Whether each group of M along the last axis keeps at most N."""
    if moved.shape[-1] % pattern.m:
        return False
    return bool(((moved.reshape(-1, pattern.m) != 0).sum(1) <= pattern.n).all())


def _other_axis(weight: Tensor, axis: int, pattern: NM) -> int | None:
    return next((a for a in range(weight.dim()) if a != axis and _holds(weight.movedim(a, -1), pattern)), None)


def _tensorrt(at: Contraction, moved: Tensor, held: NM | None) -> str | None:
    if held is None or (held.n * 4 > 2 * held.m) or held.m > 4:
        return "not 2:4"
    if not at.flat:
        return f"{at.operator} of more than two dimensions"
    outputs, inputs = moved.reshape(-1, moved.shape[-1]).shape
    if inputs % 16 or outputs % 8:
        return f"{inputs} inputs × {outputs} outputs are not multiples of 16 and 8"
    return None


def _check_equal(
    result: Verification, store: GraphStore, manifest: dict[str, Any], checkpoint: TensorStore | None
) -> None:
    sums = manifest.get("checksums", {})
    known = set(checkpoint.names()) if checkpoint is not None else set()
    rows = {row.name: row for row in result.weights}
    digests: dict[int, str] | None = None
    unknown: list[str] = []
    try:
        for name, got in runtime_weights(store, [*store.names(), *store.inline()]):
            if name in known:
                assert checkpoint is not None
                want: Tensor | None = checkpoint.read(name)
            elif checkpoint is not None and got.dim() >= 2:
                # A file that is not ours names weights as it likes: find them by their values.
                digests = digests if digests is not None else _digests(checkpoint)
                match = digests.get(checksum(got)) or (digests.get(checksum(got.t())) if got.dim() == 2 else None)
                want = None
                if match is not None:
                    result.compared += 1
                    if name in rows:
                        rows[name].equal = True
                    continue
            elif name in sums:
                want = store.read(name)
            else:
                want = None
            if want is None:
                if name in rows:
                    unknown.append(name)
                continue
            equal = _same(got, want)
            result.compared += 1
            if name in rows and rows[name].equal is not False:
                rows[name].equal = equal
            if not equal:
                result.problems.append(f"{name}: onnxruntime gives other values than the checkpoint holds")
    except SparsifyError as error:
        result.problems.append(str(error))
    if unknown:
        result.unchecked.append(
            f"{len(unknown)} weights have no tensor of that name or with these values to compare with: "
            f"{', '.join(unknown[:3])}{'…' if len(unknown) > 3 else ''}; name a checkpoint with --against"
        )


def _same(got: Tensor, want: Tensor) -> bool:
    """Bit for bit after the graph's own cast; a MatMul's weight may be stored transposed."""
    want = want.to(got.dtype)
    if got.shape != want.shape and got.dim() == 2 and got.t().shape == want.shape:
        got = got.t()
    if got.shape != want.shape:
        return False
    equal = torch.equal(as_bits(got), as_bits(want))
    if not equal and got.dim() == 2 and got.shape[0] == got.shape[1]:
        equal = torch.equal(as_bits(got.t()), as_bits(want))
    return equal


def _digests(checkpoint: TensorStore) -> dict[int, str]:
    return {checksum(checkpoint.read(name)): name for name in checkpoint.names()}


def _check_behaviour(
    result: Verification, store: GraphStore, checkpoint: TensorStore | None, folder: Path, manifest: dict[str, Any]
) -> None:
    if not (folder / "config.json").is_file():
        result.unchecked.append("outputs: no config.json, so there is no torch model to compare with")
        return
    compute = str(manifest.get("onnx", {}).get("compute", "float32"))
    try:
        stored = GraphStore(store.file, manifest.get("onnx", {}).get("transposed", ()))
        model = torch_model(folder, checkpoint or stored, getattr(torch, compute))
        result.behaviour = behave(store, model)
    except BackendError as error:
        result.problems.append(str(error))
        return
    except Exception as error:  # a graph with inputs of its own, which is no fault of its weights
        result.unchecked.append(f"outputs: not compared ({first_line(error)})")
        return
    if result.behaviour.difference > _TOLERANCE[compute]:
        result.problems.append(
            f"outputs: they differ from torch's by {result.behaviour.difference:.1e} of their size, "
            f"more than {_TOLERANCE[compute]:.0e}"
        )


@dataclass(frozen=True)
class Promise:
    """What ``sparsify.json`` says of one tensor."""

    pattern: Pattern
    kept: float


def promises(manifest: dict[str, Any]) -> dict[str, Promise]:
    """What the manifest says each checkpoint tensor holds, by the last pass that pruned it."""
    promised = {}
    for run in manifest.get("passes", []):
        for site in run["sites"]:
            for tensor in site["tensors"]:
                # A site of several tensors (experts) has one kept share for all: each may differ.
                kept = site["kept"] if len(site["tensors"]) == 1 else 1.0
                promised[tensor] = Promise(parse_pattern(site["pattern"]), kept)
    return promised


def _checkpoint(folder: Path, result: Verification) -> Checkpoint | None:
    if not (folder / WEIGHTS).exists() and not (folder / INDEX).exists():
        return None
    try:
        return Checkpoint(folder)
    except CheckpointError as error:
        result.problems.append(str(error))
        return None
