"""A captured graph as text, to read and to diff: inputs, nodes with shapes, parameters with their zeros, sites.

Names are those of the graph, one thing a line, nothing that changes from run to run: two texts differ where two
programs do. ``sparsify inspect --graph`` and ``sparsify compile --print-after PASS`` print it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from sparsify.analysis.linear import LinearSite, find_sites
from sparsify.data.batches import example_batch
from sparsify.finite import infinities_allowed, said, scan
from sparsify.frontend.capture import Batch, capture
from sparsify.frontend.source import open_source
from sparsify.ir.operators import exact_name
from sparsify.ir.program import Program
from sparsify.method.pattern import NM
from sparsify.method.selection import holds

# Looked for in weights with zeros, the tightest first.
_PATTERNS = (NM(1, 4), NM(2, 4), NM(4, 8))


def graph_text(program: Program) -> str:
    """The program in lines; reads every parameter once."""
    sites, opaque = find_sites(program)
    parts = [
        [f"graph of {program.model or 'a bare graph'}"],
        ["inputs:", *(f"  {node.meta['input']} {_value(node)}" for node in program.inputs)],
        ["parameters:", *_parameters(program, {site.parameter: site for site in sites})],
        ["nodes:", *(f"  {line}" for line in _nodes(program))],
        ["sites:", *(f"  {site}{_where(site)}" for site in sites), *(f"  not prunable: {o}" for o in opaque)],
    ]
    return "\n".join(line for part in parts for line in part)


def inspect_graph(
    model: str | Path | nn.Module,
    *,
    batch: Batch | None = None,
    allow_bin: bool = False,
    trust_remote_code: bool = False,
    check: bool = True,
) -> str:
    """Trace ``model`` and give its graph as text.

    Args:
        batch: inputs to trace it by, where its config does not tell them; only shapes and dtypes matter.

    Raises:
        CheckpointError, TraceError: no such model, or no graph of it.
    """
    # Whoever looks at a model may look at a broken one.
    source = open_source(model, allow_bin=allow_bin, trust_remote_code=trust_remote_code, check=check, allow_nan=True)
    return graph_text(capture(source, batch or example_batch(source)))


def _parameters(program: Program, sites: dict[str, LinearSite]) -> Iterator[str]:
    seen: set[str] = set()
    for node in program.graph.nodes:
        name = program.parameter(node)
        if name is not None and (canonical := program.weights.canonical(name)) not in seen:
            seen.add(canonical)
            value = program.weights.read(canonical)
            found = scan(value, mask=infinities_allowed(canonical))
            broken = f"; {said(found, value.shape)}" if found.count else ""
            yield f"  {canonical} {list(value.shape)} {_dtype(value)}, {_zeros(value, sites.get(canonical))}{broken}"


def _zeros(value: Tensor, site: LinearSite | None) -> str:
    zeros = int((value == 0).sum())
    text = f"{zeros / max(1, value.numel()):.2%} zeros"
    if site is None or not zeros:
        return text
    matrices = site.matrices(value).flatten(0, 1)
    held = [p for p in _PATTERNS if p.unfit(matrices.shape[1]) is None and holds(matrices, p) is None]
    return f"{text}, {held[0]}" if held else text


def _nodes(program: Program) -> Iterator[str]:
    for node in program.graph.nodes:
        if node.op == "get_attr":
            kind = "constant" if program.parameter(node) is None else "parameter"
            yield f"{node.name} = {kind} {node.target} {_value(node)}"
        elif node.op == "output":
            yield f"return {_text(node.args[0])}"
        elif node.op == "call_function":
            given = [_text(a) for a in node.args] + [f"{k}={_text(v)}" for k, v in node.kwargs.items()]
            yield f"{node.name} = {exact_name(node)}({', '.join(given)}) {_value(node)}"


def _text(argument: Any) -> str:
    """An argument of a node, nodes by their names."""
    if isinstance(argument, fx.Node):
        return argument.name
    if isinstance(argument, (list, tuple)):
        return f"[{', '.join(map(_text, argument))}]"
    return str(argument)


def _value(node: fx.Node) -> str:
    val = node.meta.get("val")
    if isinstance(val, Tensor):
        return f"{list(val.shape)} {_dtype(val)}"
    if isinstance(val, (list, tuple)):
        return f"({', '.join(f'{list(v.shape)} {_dtype(v)}' if isinstance(v, Tensor) else str(v) for v in val)})"
    return str(val)


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _where(site: LinearSite) -> str:
    router = ", chooses experts" if site.router else ""
    return f", reads {site.activation.name} at {site.node.name}{router}"
