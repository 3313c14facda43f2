"""Where a program is cut for its regions: before and behind each repeated block, where least is alive.

A block begins with what makes its first layer's input, a norm mostly, and ends where its result is one value, the
residual stream; the cut between two blocks is where the values alive are smallest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor, fx

from sparsify.analysis.flow import Flow
from sparsify.analysis.linear import find_sites
from sparsify.errors import TraceError
from sparsify.ir.program import Program


@dataclass(frozen=True)
class Block:
    """A repeated block: the nodes at positions [start, stop), and the value that it gives to what comes after it."""

    name: str
    start: int
    stop: int
    output: fx.Node


def find_blocks(program: Program) -> list[Block]:
    """The repeated blocks of ``program`` in the order in which they run.

    Raises:
        TraceError: there are none, or their nodes are mixed.
    """
    flow = Flow.of(program)
    spans: dict[str, tuple[int, int]] = {}
    others: list[int] = []
    for site in find_sites(program)[0]:
        if site.node not in flow.varying:
            continue
        at = flow.position[site.node]
        if site.block is None:
            others.append(at)
            continue
        first, last = spans.get(site.block, (at, at))
        spans[site.block] = (min(first, at), max(last, at))
    ordered = sorted(spans.items(), key=lambda item: item[1])
    if not ordered:
        raise TraceError(
            f"refining {program.model or 'a graph'}",
            found="no repeated blocks with linear layers",
            do="Give it a model of blocks, or train it with sparsify tune",
        )
    for (name, (_, last)), (after, (first, _)) in zip(ordered, ordered[1:], strict=False):
        if first <= last:
            raise TraceError(
                f"refining {program.model or 'a graph'}",
                found=f"blocks {name} and {after} run mixed with each other",
                do="Refine a model whose blocks run one after the other",
            )
    sizes = alive(flow)
    cuts, before = [], -1
    for _, (first, last) in ordered:
        cuts.append(smallest(sizes, before + 1, first))
        before = last
    # Behind the last block a head reads, or nothing more is multiplied.
    beyond = min((at for at in others if at > before), default=len(flow.order) - 1)
    cuts.append(smallest(sizes, before + 1, beyond))
    return [
        Block(name, start, stop, output)
        for (name, _), start, stop in zip(ordered, cuts, cuts[1:], strict=False)
        if (output := _output(flow, start, stop)) is not None
    ]


def alive(flow: Flow) -> list[int]:
    """For each position, the numbers in all values that are made before it and read at or behind it."""
    change = [0] * (len(flow.order) + 2)
    for node in flow.order:
        value = node.meta.get("val")
        if node in flow.varying and node.op != "placeholder" and isinstance(value, Tensor) and flow.uses[node]:
            change[flow.position[node] + 1] += value.numel()
            change[max(flow.uses[node]) + 1] -= value.numel()
    return list(accumulate(change))


def smallest(sizes: Sequence[int], first: int, last: int) -> int:
    """The position from ``first`` to ``last`` before which least is alive, by ``sizes`` of :func:`alive`."""
    return min(range(first, last + 1), key=lambda at: sizes[at])


def _output(flow: Flow, start: int, stop: int) -> fx.Node | None:
    """The largest value that is made in [start, stop) and read behind it, the last of several."""
    found = None
    for node in flow.order[start:stop]:
        value = node.meta.get("val")
        if not (node in flow.varying and isinstance(value, Tensor) and value.is_floating_point()):
            continue
        if max(flow.uses[node], default=-1) >= stop and (found is None or value.numel() >= found.meta["val"].numel()):
            found = node
    return found
