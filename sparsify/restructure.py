"""Run a structural pass: score the groups of a model, cut them, and write the smaller model as a Hugging Face folder.

The folder is an ordinary one: config.json says the new widths, and the model that transformers builds from it is
compared with the cut graph before anything is believed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, fx

from sparsify import drop_layers
from sparsify.analysis import Dimensions, Group, coupled_dimensions, find_sites
from sparsify.analysis.linear import LinearSite, block_of
from sparsify.calibration.gradients import Gradients, measure_gradients
from sparsify.capture import Batch, capture
from sparsify.config_widths import Widths, together
from sparsify.dimension_report import group_kind, roles_of
from sparsify.errors import BackendError, CheckpointError, SpecError, TraceError
from sparsify.manifest import MANIFEST, read_manifest
from sparsify.program import Program
from sparsify.pruning import Observer
from sparsify.restructured import Cut, Restructured
from sparsify.same_graph import difference
from sparsify.shrink import CutStore, kept_positions, shrink
from sparsify.smaller_files import write_files, write_tensors
from sparsify.source import Source, open_source
from sparsify.structural import KINDS, Part, StructuralPass
from sparsify.targets import Skipped, Target, choose
from sparsify.weights import Weights


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
    if structural_pass.granularity == "layer":
        stack = drop_layers.stack_of(program)
        cut = Cut(
            "layers", stack.container, stack.count, stack.count - drop_layers.how_many(stack, structural_pass), (), ()
        )
        return Restructured(structural_pass, [cut], [], {}, (_count(program), 0))
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
    if structural_pass.granularity == "layer":
        targets, _ = choose(program, find_sites(program)[0], structural_pass.pattern, ignore=ignore, only=only)
    else:
        dimensions, choices, skipped = _choose(program, structural_pass, ignore, only)
        targets = _targets(program, choices)
    gradients = Gradients(memory // 4)
    with gradients:
        if structural_pass.statistics:
            assert batches is not None, "a pass that needs data was given some"
            wanted = set(structural_pass.statistics)
            measure_gradients(
                program, targets, [dict(b) for b in batches], labels, wanted, gradients, memory, place, observe
            )
        scorer = _Scorer(program, structural_pass, gradients, 1 if batches is None else len(batches))
        if structural_pass.granularity == "layer":
            return _without_layers(source, program, structural_pass, targets, scorer, seed, into)
        scores = [scorer.scores(choice, seed)[torch.from_numpy(choice.group.free)].double() for choice in choices]
    if structural_pass.scope == "global":
        choices, scores = _shared_out(structural_pass, choices, scores)
    remove = {
        c.number: sorted(c.group.free[s.argsort(stable=True).numpy()[: len(s) - c.left]].tolist())
        for c, s in zip(choices, scores, strict=True)
    }
    small = shrink(program, dimensions, remove)
    kept = kept_positions(dimensions, remove)
    config = together([c.changes for c in choices])
    cut = Weights(CutStore(program.weights, kept), {n: n for n in program.weights.parameters()})
    write_files(source, cut, program.weights, config, into)
    cuts = [
        Cut(c.kind, c.name, len(c.group.free), c.left, tuple(remove[c.number]), tuple(
            (m.parameter, m.axis, tuple(kept[m.parameter][m.axis].tolist())) for m in c.group.members
            if m.axis in kept.get(m.parameter, {})
        )) for c in choices
    ]  # fmt: skip
    counts = _count(program), sum(math.prod(n.meta["val"].shape) for n in _parameter_nodes(small).values())
    done = Restructured(structural_pass, cuts, skipped, config, counts)
    _note(source, done, into)
    _compare(into, source, small, example)
    return done


def _without_layers(
    source: Source, program: Program, structural_pass: StructuralPass, targets: Sequence[Target], scorer: _Scorer,
    seed: int, into: Path,
) -> Restructured:  # fmt: skip
    """Blocks by the importance of all of their named weights together."""
    stack = drop_layers.stack_of(program)
    parts: list[list[str]] = [[] for _ in range(stack.count)]
    for target in targets:
        if (number := stack.number(target.parameter)) is not None:
            parts[number].append(target.parameter)
    scores = [scorer.whole(names, seed + i) for i, names in enumerate(parts)]
    gone = drop_layers.least(stack, structural_pass, scores)
    config = drop_layers.new_config(source, stack, gone)
    write_tensors(source, lambda: drop_layers.tensors(source, program.weights, stack, gone), config, into)
    cut = Cut("layers", stack.container, stack.count, stack.count - len(gone), tuple(gone), ())
    trust = source.trust_remote_code
    after = sum(p.numel() for p in open_source(into, trust_remote_code=trust).module.parameters())
    done = Restructured(structural_pass, [cut], [], config, (_count(program), after))
    _note(source, done, into)
    return done


def _note(source: Source, done: Restructured, into: Path) -> None:
    """Until the output has a manifest of its own this is what says what was taken out."""
    before = read_manifest(source.folder).get("structure", []) if source.folder is not None else []
    text = json.dumps({"structure": [*before, done.as_dict()]})
    (into / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _parameter_nodes(program: Program) -> dict[str, fx.Node]:
    """The first node of each parameter; what the checkpoint holds beside them (a router's correction) is none."""
    assert program.source is not None, "a program of a model"
    own = {program.weights.canonical(name) for name, _ in program.source.module.named_parameters()}
    found: dict[str, fx.Node] = {}
    for node in program.nodes:
        if node.op == "get_attr" and (name := program.parameter(node)) is not None:
            found.setdefault(program.weights.canonical(name), node)
    return {name: node for name, node in found.items() if name in own}


def _shared_out(
    structural_pass: StructuralPass, choices: Sequence[_Choice], scores: Sequence[Tensor]
) -> tuple[list[_Choice], list[Tensor]]:
    """As many channels of each kind as before, but the least of all groups together; scores by their group's mean.

    The official code compares heads and channels on one scale, where the sums over a head's columns always win.
    """
    left = {c.number: c.left for c in choices}
    for kind in {c.kind for c in choices}:
        own = [(c, s / s.mean().clamp(min=1e-300)) for c, s in zip(choices, scores, strict=True) if c.kind == kind]
        wanted = sum(len(s) - c.left for c, s in own)
        owner = torch.cat([torch.full((len(s),), i) for i, (_, s) in enumerate(own)])
        lost = [0] * len(own)
        for i in owner[torch.cat([s for _, s in own]).argsort(stable=True)].tolist():
            unit = structural_pass.unit(len(own[i][1]), kind)
            if sum(lost) == wanted:
                break
            if lost[i] < len(own[i][1]) - unit:
                lost[i] += 1
        for (c, s), gone in zip(own, lost, strict=True):
            unit = structural_pass.unit(len(s), kind)
            left[c.number] = max(unit, round((len(s) - gone) / unit) * unit)
    kept = [
        (replace(c, left=left[c.number]), s) for c, s in zip(choices, scores, strict=True) if left[c.number] < len(s)
    ]
    return [c for c, _ in kept], [s for _, s in kept]


def replay(dense: str | Path, cuts: Sequence[Mapping[str, Any]], into: Path, config: Mapping[str, Any]) -> Path:
    """Cut the dense checkpoint by the list that ``sparsify.json`` holds: the pruned one again, bit for bit.

    Args:
        cuts: ``structure[i]["cuts"]``. config: ``structure[i]["config"]``.
    """
    source = open_source(dense)
    into.mkdir(parents=True, exist_ok=True)
    layers = drop_layers.removed_of(cuts)
    if layers is not None:
        write_tensors(source, lambda: drop_layers.tensors(source, source.weights, *layers), config, into)
        return into
    kept: dict[str, dict[int, Any]] = {}
    for cut in cuts:
        for name, axis, positions in cut["members"]:
            kept.setdefault(str(name), {})[int(axis)] = numpy.asarray(positions)
    weights = Weights(CutStore(source.weights, kept), {n: n for n in source.weights.parameters()})
    write_files(source, weights, source.weights, config, into)
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
    named, routers = {t.parameter for t in targets}, {site.parameter for site in sites if site.router}
    transformers = program.source is not None and program.source.is_transformers
    uniform = transformers and not structural_pass.ragged
    widths = Widths(program.source) if uniform and program.source is not None else None
    order = list(dict.fromkeys(site.block for site in sites if site.block is not None))
    whole = {*order[: structural_pass.keep_first], *order[len(order) - structural_pass.keep_last :]}
    choices: list[_Choice] = []
    skipped: list[Skipped] = []
    for number, group in enumerate(dimensions.groups):
        kind = group_kind(group, roles)
        linear = [m.parameter for m in group.members if (m.parameter, m.axis) in roles]
        blocks = {block_of(m.parameter) for m in group.members}
        wide = kind == "width"
        if kind not in KINDS[structural_pass.granularity] or not linear or (not wide and None in blocks):
            continue
        # A router is never named: its row goes with its expert.
        linear = [name for name in linear if name not in routers]
        name = ", ".join(dict.fromkeys(n.removesuffix(".weight") for n in linear)) if not wide else "the residual width"
        if not wide and not set(linear) <= named:
            if set(linear) & named or not only:
                skipped.append(Skipped(name, "not all of it is named, or it is shared or ignored"))
            continue
        if blocks & whole:
            skipped.append(Skipped(name, "in a block that is kept whole"))
            continue
        if group.renormalized and kind in KINDS["block"]:
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
    return [Target(name, tuple(by_parameter[name]), frozenset(program.weights.sources(name))) for name in wanted]


class _Scorer:
    """Shows a pass the parameters of a group, one group after the other."""

    def __init__(self, program: Program, structural_pass: StructuralPass, gradients: Gradients, samples: int) -> None:
        self.program, self.own, self.gradients, self.samples = program, structural_pass, gradients, samples
        self.sites = {site.parameter: site for site in find_sites(program)[0]}

    def scores(self, choice: _Choice, seed: int) -> Tensor:
        parts = [self._part(m.parameter, m.axis, torch.from_numpy(m.channel)) for m in choice.group.members
                 if m.parameter in self.sites]  # fmt: skip
        return self.own.scores(parts, choice.group.channels, seed * 100_003 + choice.number)

    def whole(self, names: Sequence[str], seed: int) -> float:
        """One score for all of ``names``."""
        parts = [self._part(n, 0, torch.zeros(self.program.weights.read(n).shape[0], dtype=torch.long)) for n in names]
        return float(self.own.scores(parts, 1, seed)[0]) if parts else 0.0

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


def _compare(folder: Path, source: Source, small: Program, example: Batch) -> None:
    """Trace the model that the folder holds: its parameters must have the shapes of the cut graph's.

    Raises:
        BackendError: it is another model.
    """
    try:
        program = capture(open_source(folder, trust_remote_code=source.trust_remote_code), example)
    except TraceError as error:
        raise BackendError(
            f"the smaller model of {source.name}", found=f"a module of it has a width built in ({error.found})",
            do="Leave its heads out (--only '*mlp*', say), or cut the graph in Python: sparsify.shrink.shrink",
        ) from error  # fmt: skip
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
