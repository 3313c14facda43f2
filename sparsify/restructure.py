"""Run a structural pass: score the groups of a model, cut them, and write the smaller model as a Hugging Face folder.

The folder is an ordinary one: config.json says the new widths, and the model that transformers builds from it is
compared with the cut graph before anything is believed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, fx

from sparsify.analysis import Dimensions, Group, coupled_dimensions, find_sites
from sparsify.analysis.linear import LinearSite, block_of
from sparsify.analysis.rules.common import rule_name
from sparsify.calibration.gradients import Gradients, measure_gradients
from sparsify.capture import Batch, capture
from sparsify.checkpoint import INDEX
from sparsify.config_widths import Widths, together
from sparsify.dimension_report import group_kind, roles_of
from sparsify.errors import BackendError, CheckpointError, SpecError
from sparsify.manifest import MANIFEST
from sparsify.program import Program
from sparsify.pruning import Observer
from sparsify.safetensors_file import lay_out, lay_out_files, layout_of
from sparsify.shrink import CutStore, kept_positions, shrink
from sparsify.source import Source, open_source
from sparsify.structural import Part, StructuralPass
from sparsify.targets import Skipped, Target, choose
from sparsify.weights import Weights

# Files of a model folder that hold weights, which are written anew.
_WEIGHT_FILES = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".data"}


@dataclass(frozen=True)
class Cut:
    """What was taken out of one group.

    Attributes:
        kind: heads, channels, experts or width. name: where it is. before, after: how many there are.
        removed: their numbers. members: (parameter, axis, positions that stay), the replayable edit.
    """

    kind: str
    name: str
    before: int
    after: int
    removed: tuple[int, ...]
    members: tuple[tuple[str, int, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Restructured:
    """One structural pass, done (or planned: ``removed`` is empty then)."""

    structural_pass: StructuralPass
    cuts: list[Cut]
    skipped: list[Skipped]
    config: dict[str, Any]
    parameters: tuple[int, int]

    def lines(self) -> list[str]:
        """For a terminal."""
        kinds: dict[tuple[str, int, int], int] = {}
        for cut in self.cuts:
            key = (cut.kind, cut.before, cut.after)
            kinds[key] = kinds.get(key, 0) + 1
        parts = [f"{kind} {before} → {after} (×{count})" for (kind, before, after), count in kinds.items()]
        before, after = self.parameters
        shrunk = f"; parameters {before:,} → {after:,} ({after / before:.3f}×)" if after else ""
        reasons: dict[str, int] = {}
        for skipped in self.skipped:
            reasons[skipped.reason] = reasons.get(skipped.reason, 0) + 1
        kept = [f"not as asked: {count} × {reason}" for reason, count in reasons.items()]
        return [f"{', '.join(parts)}{shrunk}", *kept]

    def as_dict(self) -> dict[str, Any]:
        return {
            "config": self.config,
            "parameters": list(self.parameters),
            "cuts": [
                {"kind": c.kind, "name": c.name, "before": c.before, "after": c.after, "removed": list(c.removed),
                 "members": [[name, axis, list(kept)] for name, axis, kept in c.members]}
                for c in self.cuts
            ],
        }  # fmt: skip


@dataclass(frozen=True)
class _Choice:
    number: int
    group: Group
    kind: str
    name: str
    left: int
    changes: dict[str, Any]


def plan(program: Program, structural_pass: StructuralPass, ignore: Sequence[str], only: Sequence[str]) -> Restructured:
    """What a pass would do: which groups, from how many to how many; reads no weight."""
    _, choices, skipped = _choose(program, structural_pass, ignore, only)
    cuts = [Cut(c.kind, c.name, len(c.group.free), c.left, (), ()) for c in choices]
    return Restructured(structural_pass, cuts, skipped, {}, (_count(program), 0))


def restructure(
    source: Source, structural_pass: StructuralPass, batches: Sequence[Batch] | None, labels: Sequence[Tensor] | None,
    example: Batch, into: Path, *, ignore: Sequence[str] = (), only: Sequence[str] = (), memory: int = 8 << 30,
    device: torch.device | None = None, seed: int = 0, observe: Observer = lambda progress: None,
) -> Restructured:  # fmt: skip
    """Write the smaller model of ``source`` into the folder ``into``.

    Args:
        batches: one calibration sample each, for a pass that needs gradients. example: one batch, for its shapes.

    Raises:
        SpecError: a ratio that leaves nothing, names that match nothing, or groups that all are pinned.
        BackendError: widths that the model's config cannot say, or a smaller model that computes something else.
    """
    place = device or torch.device("cpu")
    program = capture(source, example, place)
    dimensions, choices, skipped = _choose(program, structural_pass, ignore, only)
    with Gradients(memory // 4) as gradients:
        if structural_pass.statistics:
            assert batches is not None, "a pass that needs data was given some"
            targets = _targets(program, choices)
            wanted = set(structural_pass.statistics)
            measure_gradients(
                program, targets, [dict(b) for b in batches], labels, wanted, gradients, memory, place, observe
            )
        scorer = _Scorer(program, structural_pass, gradients, 1 if batches is None else len(batches))
        remove = {}
        for choice in choices:
            scores = scorer.scores(choice, seed)
            free = torch.from_numpy(choice.group.free)
            order = free[scores[free].argsort(stable=True)]
            remove[choice.number] = sorted(int(c) for c in order[: len(free) - choice.left])
    small = shrink(program, dimensions, remove)
    kept = kept_positions(dimensions, remove)
    config = together([c.changes for c in choices])
    cut = Weights(CutStore(program.weights, kept), {n: n for n in program.weights.parameters()})
    _write_files(source, cut, program.weights, config, into)
    _compare(into, source, small, example)
    cuts = [
        Cut(c.kind, c.name, len(c.group.free), c.left, tuple(remove[c.number]), tuple(
            (m.parameter, m.axis, tuple(kept[m.parameter][m.axis].tolist())) for m in c.group.members
        )) for c in choices
    ]  # fmt: skip
    after = sum(p.numel() for p in open_source(into, trust_remote_code=source.trust_remote_code).module.parameters())
    return Restructured(structural_pass, cuts, skipped, config, (_count(program), after))


def replay(dense: str | Path, cuts: Sequence[Mapping[str, Any]], into: Path, config: Mapping[str, Any]) -> Path:
    """Cut the dense checkpoint by the list that ``sparsify.json`` holds: the pruned one again, bit for bit.

    Args:
        cuts: ``structure[i]["cuts"]``. config: ``structure[i]["config"]``.
    """
    source = open_source(dense)
    kept: dict[str, dict[int, Any]] = {}
    for cut in cuts:
        for name, axis, positions in cut["members"]:
            kept.setdefault(str(name), {})[int(axis)] = numpy.asarray(positions)
    weights = Weights(CutStore(source.weights, kept), {n: n for n in source.weights.parameters()})
    into.mkdir(parents=True, exist_ok=True)
    _write_files(source, weights, source.weights, config, into)
    return into


def _count(program: Program) -> int:
    assert program.source is not None, "a program of a model"
    return sum(p.numel() for p in program.source.module.parameters())


def _choose(
    program: Program, structural_pass: StructuralPass, ignore: Sequence[str], only: Sequence[str]
) -> tuple[Dimensions, list[_Choice], list[Skipped]]:
    """The groups that the pass is for, and how many channels of each stay."""
    dimensions, roles = coupled_dimensions(program), roles_of(program)
    sites = find_sites(program)[0]
    targets, _ = choose(program, sites, structural_pass.pattern, ignore=ignore, only=only)
    named = {t.parameter for t in targets}
    transformers = program.source is not None and program.source.is_transformers
    widths = Widths(program.source) if transformers and program.source is not None else None
    choices: list[_Choice] = []
    skipped: list[Skipped] = []
    for number, group in enumerate(dimensions.groups):
        kind = group_kind(group, roles)
        linear = [m.parameter for m in group.members if (m.parameter, m.axis) in roles]
        blocks = {block_of(m.parameter) for m in group.members}
        wide = kind == "width"
        if wide != (structural_pass.granularity == "channel") or not linear or (not wide and None in blocks):
            continue
        name = ", ".join(dict.fromkeys(n.removesuffix(".weight") for n in linear)) if not wide else "the residual width"
        if not wide and not set(linear) <= named:
            if set(linear) & named or not only:
                skipped.append(Skipped(name, "not all of it is named, or it is shared or ignored"))
            continue
        if kind == "experts":
            skipped.append(Skipped(name, "whole experts are not removed by this pass"))
            continue
        if group.renormalized and not wide:
            skipped.append(Skipped(name, "a norm is taken over them, which fewer would change"))
            continue
        if len(group.free) < 2:
            skipped.append(Skipped(name, group.reason or "a single one"))
            continue
        left = structural_pass.left(len(group.free), kind)
        changes: dict[str, Any] = {}
        if widths is not None:
            left, changes, why = widths.say(group, kind, left)
            if why is not None:
                skipped.append(Skipped(name, why))
        if left < len(group.free):
            choices.append(_Choice(number, group, kind, name, left, changes))
    if not choices:
        reasons = "; ".join(f"{s.name}: {s.reason}" for s in skipped[:3]) or "no group of channels"
        raise SpecError(
            f"pass {structural_pass.name}", found=f"nothing that can be removed ({reasons})",
            do="See sparsify inspect MODEL --dimensions",
        )  # fmt: skip
    return dimensions, choices, skipped


def _targets(program: Program, choices: Sequence[_Choice]) -> list[Target]:
    by_parameter: dict[str, list[LinearSite]] = {}
    for site in find_sites(program)[0]:
        by_parameter.setdefault(site.parameter, []).append(site)
    wanted = dict.fromkeys(m.parameter for c in choices for m in c.group.members if m.parameter in by_parameter)
    return [Target(name, by_parameter[name], frozenset(program.weights.sources(name))) for name in wanted]


class _Scorer:
    """Shows a pass the parameters of a group, one group after the other."""

    def __init__(self, program: Program, structural_pass: StructuralPass, gradients: Gradients, samples: int) -> None:
        self.program, self.own, self.gradients, self.samples = program, structural_pass, gradients, samples
        self.sites = {site.parameter: site for site in find_sites(program)[0]}

    def scores(self, choice: _Choice, seed: int) -> Tensor:
        parts = [self._part(m.parameter, m.axis, torch.from_numpy(m.channel)) for m in choice.group.members
                 if m.parameter in self.sites]  # fmt: skip
        return self.own.scores(parts, choice.group.channels, seed * 100_003 + choice.number)

    def _part(self, name: str, axis: int, channel: Tensor) -> Part:
        weight = self.program.weights.read(name)

        def rows(value: Tensor) -> Tensor:
            return value.float().movedim(axis, 0).reshape(value.shape[axis], -1)

        gradient = fisher = None
        if self.own.statistics:
            site = self.sites[name]
            found = {n: site.layout(v, weight) for n, v in self.gradients.read(site).items()}
            # Sums over samples, as they were measured; means here.
            gradient = rows(found["gradient"]) / self.samples if "gradient" in found else None
            fisher = rows(found["gradient_l2"]).square() / self.samples if "gradient_l2" in found else None
        return Part(rows(weight), gradient, fisher, channel)


def _write_files(source: Source, weights: Weights, dense: Weights, config: Mapping[str, Any], into: Path) -> None:
    assert source.folder is not None, "a model in memory was saved first"
    for path in source.folder.iterdir():
        if path.is_file() and path.suffix not in _WEIGHT_FILES and path.name not in (INDEX, MANIFEST):
            shutil.copyfile(path, into / path.name)
    text = json.loads((into / "config.json").read_text(encoding="utf-8"))
    place = text["text_config"] if isinstance(text.get("text_config"), dict) else text
    place.update(config)
    (into / "config.json").write_text(json.dumps(text, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    stored = {n: dense.stored(name, weights.read(name)) for name in dense.parameters() for n in dense.sources(name)[:1]}
    tensors = {n: t for parts in stored.values() for n, t in parts.items()}
    if source.checkpoint is None:
        out = lay_out(into, {n: (t.dtype, list(t.shape)) for n, t in tensors.items()})
    else:
        files = {file: {n: (d, list(tensors[n].shape) if n in tensors else list(s)) for n, (d, s) in held.items()}
                 for file, held in layout_of(source.checkpoint).items()}  # fmt: skip
        out = lay_out_files(into, files)
        for name in source.checkpoint.names():
            if name not in tensors:
                tensors[name] = source.checkpoint.read(name)
    for name, tensor in tensors.items():
        out.write(name, tensor.to(out.dtype(name)).contiguous())


def _compare(folder: Path, source: Source, small: Program, example: Batch) -> None:
    """Trace the model that the folder holds: its parameters must have the shapes of the cut graph's.

    Raises:
        BackendError: it is another model.
    """
    try:
        program = capture(open_source(folder, trust_remote_code=source.trust_remote_code), example)
    except CheckpointError as error:
        raise BackendError(
            f"the smaller model of {source.name}", found=f"config.json cannot say all of its widths ({error.found})",
            do="Leave some groups out (--ignore, --only): sparsify inspect MODEL --dimensions names them",
        ) from error  # fmt: skip
    for name in small.weights.parameters():
        if name not in program.weights or not torch.equal(program.weights.read(name), small.weights.read(name)):
            raise BackendError(
                f"the smaller model of {source.name}",
                found=f"{name} is another one in the model that config.json builds",
                do="Report this as a bug, with the model",
            )  # fmt: skip
    if (why := difference(small, program)) is not None:
        raise BackendError(
            f"the smaller model of {source.name}", found=f"config.json builds a model that computes otherwise ({why})",
            do="Leave these groups out (--ignore), or cut the graph in Python: sparsify.shrink.shrink",
        )  # fmt: skip


def difference(one: Program, other: Program) -> str | None:
    """Where two programs differ, operator by operator: in name, shape, numbers or constants; None where nowhere."""
    if len(one.nodes) != len(other.nodes):
        return f"{len(one.nodes)} nodes and {len(other.nodes)}"
    for a, b in zip(one.nodes, other.nodes, strict=True):
        shapes = [[tuple(v.shape) for v in _flat(n.meta.get("val"))] for n in (a, b)]
        names = [rule_name(n) if n.op == "call_function" else n.op for n in (a, b)]
        # Parts of one size and parts whose sizes are told are the same parts.
        alike = names[0] == names[1] or set(names) <= {"chunk", "split", "split_with_sizes"}
        if not alike or shapes[0] != shapes[1] or _numbers(a) != _numbers(b):
            return f"{a.name} and {b.name}"
        if a.op == "get_attr" and str(b.target) in other.constants:
            held = one.constants.get(str(a.target))
            if held is None or not torch.equal(held, other.constants[str(b.target)]):
                return f"the constant {b.target}"
    return None


def _flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for v in value or () for t in _flat(v)]


def _numbers(node: fx.Node) -> list[float]:
    """Factors among the arguments of a node; sizes show in shapes."""
    found: list[float] = []
    fx.node.map_aggregate((node.args, node.kwargs), lambda v: found.append(v) if isinstance(v, float) else None)
    return found
