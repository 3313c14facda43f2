"""``export_onnx``: the exporter for Python, on models and on graphs that other passes have edited."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from sparsify.backends.hf import without_sharing
from sparsify.backends.onnx.backend import FILE, ONNX, storage_notes, write_graph
from sparsify.backends.onnx.contract import Contract
from sparsify.backends.onnx.folder import write_genai_config
from sparsify.backends.onnx.graph import name_dimensions, to_graph
from sparsify.backends.onnx.store import GraphStore
from sparsify.backends.onnx.trace import export, fake_copy, quiet, trace_model
from sparsify.compiler.pipeline import compile
from sparsify.errors import BackendError, SpecError, TraceError, first_line
from sparsify.files.checkpoint import WEIGHTS, Checkpoint
from sparsify.files.staging import Staging
from sparsify.ir.graph import set_tensor
from sparsify.ir.weights import Weights


@dataclass(frozen=True)
class ExportReport:
    """What was written: the folder, and sentences for the user about what is in it."""

    output: Path
    notes: list[str]


@dataclass(frozen=True)
class TracedModel:
    """A model traced under its contract, weights and all: edit ``graph_module`` by any pass, then export it."""

    graph_module: fx.GraphModule
    contract: Contract
    config: Any


def trace_onnx(model: nn.Module) -> TracedModel:
    """Trace ``model`` (a transformers model) as the graph that would be exported, with its real weights in it.

    Raises:
        BackendError: it cannot be traced with dynamic shapes.
    """
    exported, contract = trace_model(model, _example(model), None)
    own = {f"model.{name}": tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    module = exported.module(check_guards=False)
    for name in module.state_dict():
        if name in own:
            set_tensor(module, name, own[name])
    return TracedModel(module, contract, getattr(model, "config", None))


def export_onnx(
    model: str | Path | nn.Module | fx.GraphModule | ExportedProgram | TracedModel,
    out: str | Path,
    *,
    backend: ONNX | None = None,
    example_inputs: Sequence[Tensor] | Mapping[str, Tensor] | None = None,
    overwrite: bool = False,
    **options: Any,
) -> ExportReport:
    """Write ``model`` as an ONNX folder.

    Args:
        model: a Hugging Face folder or module, written with its config and tokenizer; or a graph (what
            :func:`trace_onnx` gave, any ``GraphModule`` or ``ExportedProgram``), exported as it is now.
        backend: its options; or give them as keywords (``weights="packed"``, see :class:`ONNX`).
        example_inputs: for modules and GraphModules whose inputs are not known: tensors whose first dimension is
            the batch.

    Raises:
        BackendError: it has no ONNX form, or the graph is stale: its parameters were changed in shape and its
            operators were not. Nothing is written then.
    """
    backend = backend or ONNX(**options)
    graph: Any = model
    if isinstance(model, TracedModel):
        return _export_graph(model.graph_module, Path(out), backend, None, overwrite, model)
    if isinstance(model, (fx.GraphModule, ExportedProgram)):
        return _export_graph(graph, Path(out), backend, example_inputs, overwrite, None)
    if not isinstance(model, (str, Path, nn.Module)):
        raise BackendError(
            f"exporting a {type(model).__name__}",
            found="neither a model nor a graph of torch",
            do="Give a folder, a module, a GraphModule or an ExportedProgram; of a Compiled its output or its model",
        )
    batches = None
    if example_inputs is not None:
        batches = [dict(example_inputs) if isinstance(example_inputs, Mapping) else tuple(example_inputs)]
    result = compile(graph, [], calibration=batches, to=backend, output=out, overwrite=overwrite)
    assert result.output is not None
    return ExportReport(result.output, result.notes)


def _export_graph(
    graph: fx.GraphModule | ExportedProgram, out: Path, backend: ONNX, example: Any, overwrite: bool,
    traced: TracedModel | None,
) -> ExportReport:  # fmt: skip
    if backend.compute != ONNX.compute:
        raise SpecError(
            f"onnx:compute={backend.compute} for a graph",
            found="a graph computes in the dtype that it was traced with",
            do="Convert the model before it is traced, or export the model itself",
        )
    exported = graph if isinstance(graph, ExportedProgram) else _retrace(graph, example, traced)
    check_fresh(exported)
    state = {name: tensor for name, tensor in _state(graph).items() if name in exported.state_dict}
    contract = traced.contract if traced is not None else None
    names = (contract.input_names, contract.output_names) if contract is not None else _names(exported)
    with quiet():
        model, parameters = to_graph(exported, *names, opset=backend.opset, linear=backend.linear)
    if contract is not None:
        name_dimensions(model, contract.dims)
    prefix = "model." if state and all(name.startswith("model.") for name in state) and contract is not None else ""
    need = sum(t.numel() * t.element_size() for t in state.values())
    with Staging(out, overwrite=overwrite, need=need) as staging:
        weights = _save_state(state, prefix, staging.folder)
        stored = write_graph(model, parameters, weights, staging.folder, backend, prefix)
        if backend.weights != "link":
            (staging.folder / WEIGHTS).unlink()
        if traced is not None and traced.config is not None:
            traced.config.save_pretrained(staging.folder)
            write_genai_config(staging.folder, traced.config, traced.contract)
        # Read back what was written, so that a full disk is found here and not by the user.
        GraphStore(staging.folder / FILE)
        staging.commit()
    return ExportReport(out, storage_notes(backend, stored, contract))


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


def _retrace(graph: fx.GraphModule, example: Any, traced: TracedModel | None) -> ExportedProgram:
    """Export an edited graph again, so that every shape in it is what the edited weights make it."""
    if traced is not None:
        mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
        contract = traced.contract
        fresh = Contract(
            contract.kind, fake_copy(graph, mode), contract.inputs, contract.states, contract.outputs, contract.dims
        )
        with quiet():
            return _run_again(lambda: export(fresh))
    args, kwargs, shapes = _arguments(graph, example)
    with torch.no_grad(), quiet():
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


def _arguments(graph: fx.GraphModule, example: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
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
    from torch.utils import _pytree as pytree

    real, dynamic = [], []
    for number, value in enumerate(values):
        symbolic = [axis for axis, n in enumerate(value.shape) if not isinstance(n, int)]
        shape = [n if isinstance(n, int) else 2 + number % 3 for n in value.shape]
        real.append(torch.zeros(shape, dtype=value.dtype))
        dynamic.append(dict.fromkeys(symbolic, Dim.DYNAMIC))
    args, kwargs = pytree.tree_unflatten(real, graph._in_spec)
    shapes = pytree.tree_unflatten(dynamic, graph._in_spec)
    return args, kwargs, {**shapes[1]} if kwargs else shapes[0]


def _first_dynamic(value: Any) -> dict[int, Any]:
    return {0: Dim.DYNAMIC} if isinstance(value, Tensor) and value.dim() and value.shape[0] > 1 else {}


def _state(graph: fx.GraphModule | ExportedProgram) -> dict[str, Tensor]:
    return dict(graph.state_dict) if isinstance(graph, ExportedProgram) else dict(graph.state_dict(keep_vars=True))


def _names(exported: ExportedProgram) -> tuple[list[str], list[str]]:
    signature = exported.graph_signature
    inputs = [str(name) for name in signature.user_inputs]
    outputs = [f"output_{i}" if i else "output" for i in range(len(signature.user_outputs))]
    return inputs, outputs


def _save_state(state: Mapping[str, Tensor], prefix: str, folder: Path) -> Weights:
    from safetensors.torch import save_file

    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    own: dict[str, Tensor] = {}
    for name, tensor in state.items():
        name = name.removeprefix(prefix)
        if first.setdefault(id(tensor), name) != name:
            aliases[name] = first[id(tensor)]
            continue
        own[name] = tensor.detach().contiguous()
    save_file(without_sharing(own), folder / WEIGHTS, metadata={"format": "pt"})
    return Weights(Checkpoint(folder), {name: name for name in own}, aliases=aliases)


def _example(model: nn.Module) -> dict[str, Tensor]:
    from sparsify.data.batches import example_batch
    from sparsify.frontend.source import open_source

    source = open_source(model)
    return example_batch(source) if source.is_transformers else {}
