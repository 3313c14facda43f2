"""Graphs that passes have edited, traced again before they are exported."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from sparsify.backends.onnx.tracing.contract import Contract
from sparsify.backends.onnx.tracing.trace import export_contract, fake_copy, quiet_export, symbolic_mode
from sparsify.errors import BackendError, TraceError, first_line

# Example inputs, by position or by name.
Example = Sequence[Tensor] | Mapping[str, Tensor]


def check_fresh(exported: ExportedProgram) -> None:
    """Refuse a program whose parameters have other shapes or dtypes than its operators were traced with.

    Raises:
        BackendError: names the parameter and both shapes.
    """
    placeholders = {n.name: n.meta.get("val") for n in exported.graph.nodes if n.op == "placeholder"}
    signature = exported.graph_signature
    inputs = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    for placeholder, name in inputs.items():
        traced, now = placeholders.get(placeholder), exported.state_dict.get(name)
        if (
            isinstance(traced, Tensor)
            and isinstance(now, Tensor)
            and (traced.shape, traced.dtype) != (now.shape, now.dtype)
        ):
            raise BackendError(
                f"exporting {name}",
                found=f"it is {list(now.shape)} {now.dtype}, and the graph was traced with {list(traced.shape)} "
                f"{traced.dtype}: the program is stale",
                do="Edit program.module() instead and export that: it is traced again",
            )


def retrace(graph: fx.GraphModule, example: Example | None, contract: Contract | None) -> ExportedProgram:
    """Export an edited graph again, so that every shape in it is what the edited weights make it."""
    if contract is not None:
        fresh = dataclasses.replace(contract, wrapper=fake_copy(graph, symbolic_mode()))
        with quiet_export():
            return _run_again(lambda: export_contract(fresh))
    args, kwargs, shapes = _arguments(graph, example)
    with torch.no_grad(), quiet_export():
        return _run_again(lambda: torch.export.export(graph, args, kwargs, dynamic_shapes=shapes, strict=False))


def _run_again(function: Callable[[], ExportedProgram]) -> ExportedProgram:
    try:
        return function()
    except Exception as error:  # an operator whose shapes no longer agree, or whatever else a pass left
        cause = error.__cause__ or error
        raise BackendError(
            "exporting an edited graph",
            found=f"it does not run any more: {first_line(cause)}",
            do="After a change of shapes, correct every view, split and weight that it reaches",
        ) from error


def _arguments(graph: fx.GraphModule, example: Example | None) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Example inputs, the given ones or those that the graph was traced with, the first dimension dynamic."""
    placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    if isinstance(example, Mapping):
        return (), dict(example), {name: _first_dynamic(value) for name, value in example.items()}
    if example is not None:
        return tuple(example), {}, tuple(_first_dynamic(value) for value in example)
    values = [n.meta.get("val", n.meta.get("example_value")) for n in placeholders]
    if not all(isinstance(v, Tensor) for v in values) or getattr(graph, "_in_spec", None) is None:
        raise TraceError(
            "exporting a GraphModule",
            found="its inputs' shapes are not recorded in it",
            do="Give example_inputs, or export what trace_onnx or ExportedProgram.module() returned",
        )
    real, dynamic = [], []
    for number, value in enumerate(values):
        symbolic = [axis for axis, n in enumerate(value.shape) if not isinstance(n, int)]
        shape = [n if isinstance(n, int) else 2 + number % 3 for n in value.shape]
        real.append(torch.zeros(shape, dtype=value.dtype))
        dynamic.append(dict.fromkeys(symbolic, Dim.DYNAMIC))
    args, kwargs = pytree.tree_unflatten(real, graph._in_spec)
    shapes = pytree.tree_unflatten(dynamic, graph._in_spec)
    return args, kwargs, {**shapes[1]} if kwargs else shapes[0]


def _first_dynamic(value: object) -> dict[int, object]:
    return {0: Dim.DYNAMIC} if isinstance(value, Tensor) and value.dim() and value.shape[0] > 1 else {}
