"""What is tried of each type, step by step; each says in its own words what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from breadth.hooks import InputNorms, Key, expected_mask
from breadth.model import Tiny, differ, leaves, load, run
from breadth.shrink import tiny_config
from sparsify.compiler.result import Compiled

SPEC, STRUCTURAL = "wanda:2:4", "llm-pruner:50%,importance=l2"


class Wrong(Exception):
    """A result that is not what was promised, though nothing was refused."""


class NotReached(Exception):
    """A step whose ground an earlier one did not lay."""


@dataclass
class Trial:
    """One type on its way through the steps. ``remarks``: what a reader of the table should know."""

    tiny: Tiny
    place: Path
    pruned: Compiled | None = None
    structure: Any = None
    remarks: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def data(self) -> list[dict[str, Tensor]]:
        return [dict(batch) for batch in self.tiny.batches]

    def folder(self, name: str) -> Path:
        if not (self.place / name).exists():
            raise NotReached(name)
        return self.place / name

    def compiled(self) -> Compiled:
        if self.pruned is None:
            raise NotReached("hf")
        return self.pruned


def buffers(trial: Trial) -> None:
    """The skeleton's computed buffers are the real model's."""
    from sparsify.frontend.skeleton import build_skeleton

    skeleton: Any = build_skeleton(trial.tiny.folder)
    # Not of the model's own config, to which saving it did something.
    own = type(trial.tiny.model)
    torch.manual_seed(0)
    real = own(tiny_config(trial.tiny.kind)[0])
    torch.manual_seed(1)
    other = dict(own(tiny_config(trial.tiny.kind)[0]).named_non_persistent_buffers())
    have = dict(skeleton.named_non_persistent_buffers())
    want = dict(real.named_non_persistent_buffers())
    if have.keys() != want.keys():
        raise Wrong(f"buffers {', '.join(sorted(have.keys() ^ want.keys())[:3])} are there in one of both alone")
    bad = []
    for name, value in want.items():
        if not torch.equal(value, other[name]):
            trial.remarks.append(f"buffer {name} is random")
        elif have[name].is_meta or not _equal(have[name], value):
            bad.append(name)
    trial.numbers["buffers"] = len(want)
    if bad:
        raise Wrong(f"{len(bad)} of {len(want)} buffers differ: {', '.join(bad[:3])}")


def captured(trial: Trial) -> None:
    """The graph gives what the model gives, on inputs other than those that it was traced by."""
    from sparsify.frontend.capture import capture
    from sparsify.frontend.source import open_source

    program = capture(open_source(trial.tiny.folder), trial.tiny.batches[0])
    for batch, exact in zip(trial.tiny.batches, trial.tiny.exact, strict=True):
        gap = differ(_run_graph(program, batch), exact)
        if gap > 1e-5:
            raise Wrong(f"the graph differs from the eager model by {gap:.1e}")


def masks(trial: Trial) -> None:
    """What Wanda prunes is what plain hooks on the dense model say; what it leaves is said."""
    import sparsify

    tiny = trial.tiny
    trial.pruned = done = sparsify.compile(
        tiny.folder, [SPEC], calibration=trial.data, schedule="dense", output=trial.place / "hf", device="cpu"
    )
    model = tiny.model
    with suppress(Exception):
        model.set_experts_implementation("eager")
    with InputNorms(model) as seen:
        for batch in tiny.batches:
            run(model, batch)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    (ran,) = done.runs
    checked, idle = 0, 0
    for site in ran.sites:
        dense = parameters.get(site.parameter)
        if dense is None:
            raise Wrong(f"site {site.parameter} is no parameter of the model")
        for number, (before, after) in enumerate(
            _matrices(dense, done.weight(site.parameter), seen.canonical[site.parameter] in seen.transposed)
        ):
            squares = seen.squares.get((seen.canonical[site.parameter], number))
            if squares is None or number in site.without_data:
                idle += number in site.without_data
                continue
            bad = _unlike(before, after, squares)
            if bad and (reaching := _reaching(tiny, seen, (seen.canonical[site.parameter], number))) is not None:
                trial.remarks.append("some products with a weight that is used repeatedly reach no output")
                bad = _unlike(before, after, reaching)
            if bad:
                raise Wrong(f"{site.parameter}: {bad} of {before.numel() // 4} groups are not Wanda's by hooks")
            if not torch.equal(after[after != 0], before[after != 0]):
                raise Wrong(f"{site.parameter}: a kept weight changed")
            checked += 1
    named = {s.parameter for s in ran.sites} | {f"{r.node}.weight" for r in ran.skipped} | {r.node for r in ran.skipped}
    named |= {p for o in done.opaque for p in o.parameters}
    named = {seen.canonical.get(n, n) for n in named}
    linear = {seen.canonical[f"{n}.weight"] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    silent = sorted(n for n, _ in seen.squares if n in linear and n not in named)
    trial.numbers |= {
        "sites": len(ran.sites),
        "matrices": checked,
        "skipped": len(ran.skipped),
        "opaque": len(done.opaque),
    }
    if idle:
        trial.remarks.append(f"{idle} experts that no token reached")
    if not checked:
        trial.remarks.append("no mask could be compared with hooks")
    unreached = {n for n in linear if (n, 0) not in seen.squares}
    if unreached:
        trial.numbers["unreached"] = len(unreached)
    for opaque in {o.reason for o in done.opaque}:
        trial.remarks.append(f"not prunable: {opaque}")
    trial.remarks = list(dict.fromkeys(trial.remarks))
    dead = [n for n in silent if _reaches_nothing(tiny, parameters[n])]
    if dead:
        trial.remarks.append(f"{len(dead)} linear layers compute what no output is made of")
    if silent := [n for n in silent if n not in dead]:
        raise Wrong(f"{len(silent)} linear layers are neither pruned nor named: {', '.join(silent[:3])}")


def untouched(trial: Trial) -> None:
    """What was not pruned is there bit for bit; what was pruned has its values or zero."""
    done, out = trial.compiled(), trial.folder("hf")
    changed = {name for run_ in done.runs for site in run_.sites for name in site.sources}
    dense, pruned = _tensors(trial.tiny.folder), _tensors(out)
    if dense.keys() != pruned.keys():
        raise Wrong(f"tensors {', '.join(sorted(dense.keys() ^ pruned.keys())[:3])} are there in one of both alone")
    for name, value in dense.items():
        other = pruned[name]
        if value.dtype != other.dtype or value.shape != other.shape:
            raise Wrong(f"{name} has another dtype or shape")
        if name not in changed and not torch.equal(
            value.view(torch.uint8) if value.dim() else value, other.view(torch.uint8) if value.dim() else other
        ):
            raise Wrong(f"{name} was not pruned and changed")
        if name in changed and not torch.equal(other[other != 0], value[other != 0]):
            raise Wrong(f"{name} was pruned and a kept weight changed")


def reload(trial: Trial) -> None:
    """transformers loads the output, and it computes what the pruned model in memory does."""
    done, out = trial.compiled(), trial.folder("hf")
    model, odd = load(type(trial.tiny.model), out)
    if odd:
        raise Wrong(f"transformers says on loading: {odd}")
    # Not by sparsify: the dense model with the pruned weights set into it.
    memory, _ = load(type(trial.tiny.model), trial.tiny.folder)
    parameters = dict(memory.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for run_ in done.runs:
            for site in run_.sites:
                parameters[site.parameter].copy_(done.weight(site.parameter))
    for batch in trial.tiny.batches:
        exact = run(memory, batch)
        if (gap := differ(run(model, batch), exact)) > 1e-6:
            raise Wrong(f"the loaded model differs from the pruned one by {gap:.1e}")


def packed(trial: Trial) -> None:
    """transformers loads the packed output, and it computes what the ordinary one does."""
    import sparsify
    from sparsify.backends.packed.backend import PackedBackend
    from sparsify.backends.verify.outputs.rounding import rounding_of

    hf = trial.folder("hf")
    done = sparsify.compile(
        trial.tiny.folder, [SPEC], calibration=trial.data, schedule="dense", output=trial.place / "packed",
        to=PackedBackend(choice="smallest"), device="cpu",
    )  # fmt: skip
    own = type(trial.tiny.model)
    model = own.from_pretrained(trial.place / "packed").eval()
    exact, _ = load(own, hf)
    for batch in trial.tiny.batches:
        gap = differ(run(model, batch), run(exact, batch))
        if gap > 1e-4 and gap > 4 * rounding_of(exact, batch, lambda own, given: run(own, dict(given)), differ):
            raise Wrong(f"the packed model differs from the ordinary one by {gap:.1e}")
    count = sum("Packed" in type(m).__name__ for m in model.modules())
    trial.numbers["packed"] = count
    del done


def structural(trial: Trial) -> None:
    """A smaller model computes what the dense one does with zeros in the place of what was taken out."""
    import sparsify

    out = trial.place / "small"
    done = sparsify.compile(trial.tiny.folder, [STRUCTURAL], calibration=trial.data, output=out, device="cpu")
    own = type(trial.tiny.model)
    small, odd = load(own, out)
    if odd:
        raise Wrong(f"transformers says on loading: {odd}")
    zeros, _ = load(own, trial.tiny.folder)
    parameters = dict(zeros.named_parameters())
    with torch.no_grad():
        for cut in done.structure[0].cuts:
            for name, axis, kept in cut.members:
                gone = torch.ones(parameters[name].shape[axis], dtype=torch.bool)
                gone[list(kept)] = False
                parameters[name].index_fill_(axis, gone.nonzero()[:, 0], 0)
    for batch in trial.tiny.batches:
        if (gap := differ(run(small, batch), run(zeros, batch))) > 1e-4:
            raise Wrong(f"the smaller model differs from the one with zeros by {gap:.1e}")
    before, after = done.structure[0].parameters
    if sum(p.numel() for p in small.parameters()) != after or after >= before:
        raise Wrong(
            f"{before} parameters before, {after} said to be left, {sum(p.numel() for p in small.parameters())} there"
        )
    kinds: dict[str, int] = {}
    for cut in done.structure[0].cuts:
        kinds[cut.kind] = kinds.get(cut.kind, 0) + 1
    trial.numbers["cuts"] = kinds
    trial.numbers["whole"] = len(done.structure[0].skipped)


def onnx(trial: Trial) -> None:
    """The ONNX file of the pruned model passes ``sparsify verify``."""
    import sparsify
    from sparsify.backends.verify.onnx_folder import verify_onnx
    from sparsify.errors import BackendError

    source = trial.place / "hf" if (trial.place / "hf").exists() else trial.tiny.folder
    given: Any = {"calibration": [trial.data[0]], "output": trial.place / "onnx", "device": "cpu"}
    try:
        sparsify.compile(source, [], to="onnx", **given)
    except BackendError as error:
        if "cache=none" not in str(error):
            raise
        trial.remarks.append("onnx: only without a cache (cache=none)")
        sparsify.compile(source, [], to="onnx:cache=none", **given)
    found = verify_onnx(trial.place / "onnx")
    if found.problems:
        raise Wrong("; ".join(found.problems)[:300])
    if found.behaviour is None:
        raise Wrong(f"verify says sound, and compared no outputs: {'; '.join(found.unchecked)[:200]}")


STEPS: Mapping[str, Callable[[Trial], None]] = {
    "buffers": buffers, "capture": captured, "masks": masks, "untouched": untouched, "reload": reload,
    "packed": packed, "structural": structural, "onnx": onnx,
}  # fmt: skip


def _reaches_nothing(tiny: Tiny, weight: Tensor) -> bool:
    """Whether the outputs stay as they are when ``weight`` is another."""
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1)
        try:
            return differ(run(tiny.model, tiny.batches[0]), tiny.exact[0]) <= 1e-5
        finally:
            weight.copy_(kept)


def _unlike(before: Tensor, after: Tensor, squares: Tensor) -> int:
    """How many groups of four Wanda prunes otherwise, by ``squares``, than ``after`` says; ties do not count."""
    want, close = expected_mask(before, squares)
    got = (after != before) | (before == 0)
    bad = ((got != want) & (before != 0)).reshape(*before.shape[:-1], -1, 4).any(-1) & ~close
    return int(bad.sum())


def _reaching(tiny: Tiny, seen: InputNorms, key: Key) -> Tensor | None:
    """The squares of the products with a weight that any output depends on; None where that is all or none."""
    calls = seen.calls[key]
    each = len(calls) // len(tiny.batches)
    kept = []
    for number in range(each):
        with InputNorms(tiny.model, (key, number)):
            if differ(run(tiny.model, tiny.batches[0]), tiny.exact[0]) > 1e-5:
                kept += calls[number::each]
    return torch.stack(kept).sum(0) if 0 < len(kept) < len(calls) else None


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def _run_graph(program: Any, batch: Mapping[str, Tensor]) -> list[Tensor]:
    from sparsify.ir.graph import runnable

    with torch.no_grad():
        return leaves(runnable(program, torch.device("cpu"))(*(batch[n.meta["input"]] for n in program.inputs)))


def _matrices(before: Tensor, after: Tensor, transposed: bool) -> list[tuple[Tensor, Tensor]]:
    pair = before.detach(), after.detach()
    if before.dim() == 3:
        turned = [t.transpose(1, 2) for t in pair] if transposed else pair
        return list(zip(*turned, strict=True))
    if before.dim() != 2:
        return [(a.flatten(1), b.flatten(1)) for a, b in [pair]]
    return [tuple(t.t() for t in pair)] if transposed else [pair]  # type: ignore[list-item]


def _tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as held:
            found |= {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
    return found
