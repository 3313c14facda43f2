"""Which weights of a model are packed, in which layout, and why the others are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from torch import fx, nn

from sparsify.analysis.linear import LinearSite, find_sites
from sparsify.analysis.tables import find_tables
from sparsify.backends.packed.choosing import PRUNED, TABLE, Asked, Choosing, Decision
from sparsify.backends.packed.loaded.modules import unfit
from sparsify.context import counted
from sparsify.errors import SpecError
from sparsify.ir.program import Program
from sparsify.ir.weights import Weights
from sparsify.method.pattern import Grid
from sparsify.prune.names import Wanted
from sparsify.prune.targets import choose, read_elsewhere
from sparsify.runtime.cpu.stopwatch import Stopwatch
from sparsify.words import format_bytes


def decide(program: Program, weights: Weights, model: nn.Module, asked: Asked) -> list[Decision]:
    """One decision per parameter that a linear site reads, in topological order; what is to be rounded is, in
    ``weights``.
    """
    sites, _ = find_sites(program)
    shared, watch = _held_twice(model) | read_elsewhere(program, sites), Stopwatch()
    readers: dict[str, list[LinearSite]] = {}
    for site in sites:
        readers.setdefault(site.parameter, []).append(site)
    tables = find_tables(program)
    usual = rounded_by_default(program) if asked.values.rounds else frozenset()
    found = []
    for name in counted("choosing layouts", readers):
        own = readers[name]
        if name in shared:
            reason: str | None = f"shared with {shared[name]}"
        elif name in weights.untied and getattr(model, "all_tied_weights_keys", None):
            reason = "config.json ties it to another parameter, with which transformers compares it"
        else:
            reason = next((r for site in own if (r := _unfit_site(site))), None) or unfit(model, name)
        choosing = Choosing(name, own[0], weights, asked, watch)
        decision, rounded = choosing.decide(reason, name in usual)
        if rounded is not None and decision.site is not None:
            weights.write(name, decision.site.parameter(rounded))
        found.append(choosing.table(reason) if name in tables and reason is not None else decision)
    alone = [Choosing(name, site, weights, asked, watch) for name, site in tables.items() if name not in readers]
    # Of tables that nobody rounded nothing is said: they are dense as a matter of course.
    return found + [d for d in (choosing.table(TABLE) for choosing in alone) if d.on_grid]


def rounded_by_default(program: Program) -> frozenset[str]:
    """The parameters that a pass rounds where nobody names any: of repeated blocks, no heads and no routers."""
    try:
        return frozenset(target.parameter for target in choose(program, Grid(8), Wanted())[0])
    except SpecError:
        return frozenset()


def siblings(decisions: Iterable[Decision]) -> list[list[str]]:
    """Packed 2:4 linear layers of one block that read one input (q/k/v, gate/up), in the order in which they run."""
    groups: dict[tuple[fx.Node, str | None], list[str]] = {}
    for d in decisions:
        if d.site is not None and d.site.layout == "packed24" and d.site.experts is None:
            groups.setdefault((d.linear.activation, d.linear.block), []).append(d.name)
    return [names for names in groups.values() if len(names) > 1]


def _held_twice(model: nn.Module) -> dict[str, str]:
    """Parameters that two modules hold, with the name in the other: transformers ties them again when it has loaded."""
    names: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            names.setdefault(id(parameter), []).append(f"{prefix}.{leaf}")
    found = [held for held in names.values() if len(held) > 1]
    return {name: next(other for other in held if other != name) for held in found for name in held}


def _unfit_site(site: LinearSite) -> str | None:
    if site.window is not None or site.feature_dim != -1:
        return "not a product with the last axis of its input"
    if site.scaled:
        return "multiplied by a number when the model runs"
    if site.grouped:
        return "a linear layer in groups, whose weight the model reshapes before it multiplies"
    if site.expert_axis not in (None, 0):
        return "a stack of experts along another axis than the first"
    return None


def summary(decisions: Iterable[Decision]) -> list[str]:
    """Sentences for whoever packed a model."""
    decisions = list(decisions)
    packed = [d for d in decisions if d.site is not None]
    kinds = Counter(d.site.label for d in packed if d.site is not None)
    small, large = sum(d.nbytes for d in packed), sum(d.dense_bytes for d in packed)
    counts = ", ".join(f"{count} as {label}" for label, count in sorted(kinds.items(), reverse=True))
    text = f"packed: {counts}; {format_bytes(small)} where dense took {format_bytes(large)} ({small / large:.3f}×)"
    timed = [d.timing for d in packed if d.timing is not None]
    if timed:
        spent = sum(t.packed or 0.0 for t in timed)
        best, stock = sum(t.best_dense for t in timed), sum(t.torch for t in timed)
        text += (
            f"; one token through them, CPU time of one thread: {spent * 1e3:.2f} ms, "
            f"{best / spent:.2f}× the speed of the best dense kernel and {stock / spent:.2f}× that of F.linear"
        )
    notes = [text]
    if rounded := [d.rounding for d in packed if d.rounding is not None]:
        notes.append(rounding_note(rounded))
    # Of what nobody pruned or rounded nothing is said: it is dense as a matter of course.
    notes += _by_reason("left dense", ((d.name, d.reason) for d in decisions if d.zeros >= PRUNED or d.on_grid))
    for what, own in (("of full width", False), ("rounded again", True)):
        notes += _by_reason(what, ((d.name, d.note) for d in packed if (d.rounding is not None) is own))
    notes.append(
        "load it with `import sparsify` before transformers' from_pretrained, or serve it with vLLM or sparsify serve; "
        "sparsify bench OUT measures it"
    )
    return notes


def rounding_note(lost: Sequence[float]) -> str:
    """What rounding to nearest cost, ‖ΔW‖/‖W‖ of each weight that was."""
    return (
        f"{len(lost)} weights rounded to nearest: an error of {sum(lost) / len(lost):.2%} on average "
        f"and {max(lost):.2%} at most (‖ΔW‖/‖W‖); --pass round:int8 or int4 before loses less"
    )


def _by_reason(what: str, told: Iterable[tuple[str, str | None]]) -> list[str]:
    """A sentence for each reason, with the first names."""
    reasons: dict[str, list[str]] = {}
    for name, reason in told:
        if reason is not None:
            reasons.setdefault(reason, []).append(name)
    lines = []
    for reason, names in reasons.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines.append(f"{what}: {', '.join(names[:3])}{more}: {reason}")
    return lines
