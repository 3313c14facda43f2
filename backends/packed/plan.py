"""Which weights of a model are packed, in which layout, and why the others are not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx, nn

from sparsify.analysis.linear import LinearSite, find_sites
from sparsify.backends.packed.format import PackedSite, pack_parameter
from sparsify.backends.packed.loaded.modules import unfit
from sparsify.context import counted
from sparsify.errors import Refused
from sparsify.ir.program import Program
from sparsify.ir.weights import Weights
from sparsify.prune.targets import read_elsewhere
from sparsify.runtime.layout import choose_layout
from sparsify.runtime.packed_weight import PackedWeight
from sparsify.runtime.stopwatch import Stopwatch, Timing
from sparsify.runtime.words import LAYOUTS, AskedLayout, Layout, PackingChoice
from sparsify.words import format_bytes

# The share of zeros from which on a weight counts as pruned.
PRUNED = 0.05


@dataclass(frozen=True)
class Decision:
    """What becomes of one weight that the graph multiplies with: packed as ``site``, or dense for ``reason``.

    ``zeros``: their share; ``dense_bytes``, ``nbytes``: what it takes dense, and as it is stored.
    """

    name: str
    linear: LinearSite
    zeros: float
    dense_bytes: int
    nbytes: int
    site: PackedSite | None = None
    timing: Timing | None = None
    reason: str | None = None

    @property
    def layout(self) -> Layout | Literal["dense"]:
        return self.site.layout if self.site is not None else "dense"

    def left_dense(self, reason: str) -> Decision:
        """The same weight, not packed after all."""
        return replace(self, site=None, nbytes=self.dense_bytes, reason=reason)

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "shape": [*([self.linear.experts] if self.linear.expert_axis is not None else []), *self.linear.shape],
            "layout": self.layout,
            "zeros": round(self.zeros, 4),
            "dense_bytes": self.dense_bytes,
            "bytes": self.nbytes,
            "timing": None if self.timing is None else self.timing.as_dict(),
            "reason": self.reason,
        }


def decide(
    program: Program, weights: Weights, model: nn.Module, layout: AskedLayout, choice: PackingChoice
) -> list[Decision]:
    """One decision per parameter that a linear site reads, in topological order.

    Args:
        layout, choice: the options of the backend.
    """
    sites, _ = find_sites(program)
    shared, watch = _held_twice(model) | read_elsewhere(program, sites), Stopwatch()
    readers: dict[str, list[LinearSite]] = {}
    for site in sites:
        readers.setdefault(site.parameter, []).append(site)
    found = []
    for name in counted("choosing layouts", readers):
        own = readers[name]
        if name in shared:
            reason: str | None = f"shared with {shared[name]}"
        elif name in weights.untied and getattr(model, "all_tied_weights_keys", None):
            reason = "config.json ties it to another parameter, with which transformers compares it"
        else:
            reason = next((r for site in own if (r := _unfit_site(site))), None) or unfit(model, name)
        found.append(_decide(name, own[0], weights, reason, layout, choice, watch))
    return found


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


def _decide(
    name: str,
    linear: LinearSite,
    weights: Weights,
    reason: str | None,
    layout: AskedLayout,
    choice: PackingChoice,
    watch: Stopwatch,
) -> Decision:
    stored = weights.read(name)
    matrices = linear.matrices(stored)
    dense_bytes = stored.nbytes
    zeros = 1 - int(torch.count_nonzero(matrices)) / max(1, matrices.numel())

    def dense(why: str, timing: Timing | None = None) -> Decision:
        return Decision(name, linear, zeros, dense_bytes, dense_bytes, None, timing, why)

    if reason is not None:
        return dense(reason)
    chosen = choose_layout(matrices.reshape(-1, matrices.shape[-1]), layout)
    if isinstance(chosen, Refused):
        return dense(chosen.reason)
    timing = None
    if choice == "measured":
        # Experts are alike: one tells the time of all.
        timing = watch.packed(matrices[0].contiguous(), PackedWeight.of(matrices[0], chosen))
        if timing.slower is not None:
            return dense(f"dense is faster here ({chosen} {timing.slower})", timing)
    site, values, codes = pack_parameter(
        matrices, chosen, stacked=linear.expert_axis is not None, transposed=linear.out_axis > linear.in_axis
    )
    return Decision(name, linear, zeros, dense_bytes, values.nbytes + codes.nbytes, site, timing)


def summary(decisions: Iterable[Decision]) -> list[str]:
    """Sentences for whoever packed a model."""
    decisions = list(decisions)
    packed = [d for d in decisions if d.site is not None]
    kinds = {layout: sum(d.layout == layout for d in packed) for layout in LAYOUTS}
    small, large = sum(d.nbytes for d in packed), sum(d.dense_bytes for d in packed)
    counts = ", ".join(f"{count} as {layout}" for layout, count in kinds.items() if count)
    text = f"packed: {counts}; {format_bytes(small)} where dense took {format_bytes(large)} ({small / large:.3f}×)"
    timed = [d.timing for d in packed if d.timing is not None]
    if timed:
        spent = sum(t.packed or 0.0 for t in timed)
        best, stock = sum(t.best_dense for t in timed), sum(t.torch for t in timed)
        text += (
            f"; one token through them, CPU time of one thread: {spent * 1e3:.2f} ms, "
            f"{best / spent:.2f}× faster than the best dense kernel and {stock / spent:.2f}× than F.linear"
        )
    notes = [text]
    reasons: dict[str, list[str]] = {}
    for d in decisions:
        # What was never pruned is dense as a matter of course.
        if d.reason is not None and d.zeros >= PRUNED:
            reasons.setdefault(d.reason, []).append(d.name)
    for reason, names in reasons.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        notes.append(f"left dense: {', '.join(names[:3])}{more}: {reason}")
    notes.append("load it with `import sparsify` before transformers' from_pretrained; sparsify bench OUT measures it")
    return notes
