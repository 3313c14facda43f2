"""Graphs of the user's own, and those that passes have edited: exported as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, fx
from torch.export import ExportedProgram

from sparsify.backends.hf.saving import save_tensors
from sparsify.backends.onnx.folder import write_genai_config
from sparsify.backends.onnx.graph import name_dimensions, to_graph
from sparsify.backends.onnx.notes import said_of, storage_notes
from sparsify.backends.onnx.options import Options
from sparsify.backends.onnx.products.library import add_library
from sparsify.backends.onnx.products.packing import Packing
from sparsify.backends.onnx.retrace import Example, check_fresh, retrace
from sparsify.backends.onnx.storage.store import GraphStore
from sparsify.backends.onnx.storage.stored import digests_of, transposed
from sparsify.backends.onnx.tracing.contract import Contract
from sparsify.backends.onnx.tracing.trace import quiet_export
from sparsify.backends.onnx.writing import FILE, write_graph
from sparsify.backends.packed.grids import Values
from sparsify.errors import SpecError
from sparsify.files.checkpoint import WEIGHTS, Checkpoint
from sparsify.files.ledger import write_manifest
from sparsify.files.staging import Staging, check_output
from sparsify.finite import check_all_finite
from sparsify.ir.weights import Weights
from sparsify.provenance.card import write_card


@dataclass(frozen=True)
class TracedModel:
    """A model traced under its contract, weights and all: edit ``graph_module`` by any pass, then export it."""

    graph_module: fx.GraphModule
    contract: Contract
    config: Any


def export_graph(
    graph: TracedModel | fx.GraphModule | ExportedProgram,
    out: Path,
    options: Options,
    *,
    example: Example | None = None,
    overwrite: bool = False,
    allow_nan: bool = False,
) -> list[str]:
    """Write ``graph`` as it is now; sentences about what was written.

    Raises:
        SpecError, BackendError: as :func:`sparsify.backends.onnx.api.export_onnx`.
        CheckpointError: a tensor that is not finite.
    """
    if (claim := check_output(out, overwrite=overwrite, source=None)) is not None:
        claim.release()
    if options.compute != Options.compute:
        raise SpecError(
            f"onnx:compute={options.compute} for a graph",
            found="a graph computes in the dtype that it was traced with",
            do="Convert the model before it is traced, or export the model itself",
        )
    if options.values in ("int8", "int4"):
        raise SpecError(
            f"onnx:values={options.values} for a graph",
            found="weights of a graph are written as they are",
            do="Run the pass round before, or export the model itself",
        )
    if options.cache != Options.cache:
        raise SpecError(
            f"onnx:cache={options.cache} for a graph",
            found="a graph has the inputs that it was traced with",
            do="Trace the model so, trace_onnx(model, cache='none'), or export the model itself",
        )
    config, contract = (graph.config, graph.contract) if isinstance(graph, TracedModel) else (None, None)
    graph = graph.graph_module if isinstance(graph, TracedModel) else graph
    exported = graph if isinstance(graph, ExportedProgram) else retrace(graph, example, contract)
    check_fresh(exported)
    names = (contract.input_names, contract.output_names) if contract is not None else _names(exported)
    with quiet_export():
        model, parameters = to_graph(exported, *names, opset=options.opset, linear=options.linear)
    if contract is not None:
        name_dimensions(model, contract.dims)
    state = {name: tensor for name, tensor in _state(graph).items() if name in exported.state_dict}
    if not allow_nan:
        check_all_finite(state)
    prefix = "model." if state and all(name.startswith("model.") for name in state) and contract is not None else ""
    need = sum(t.numel() * t.element_size() for t in state.values())
    with Staging(out, overwrite=overwrite, need=need) as staging:
        weights = _save_state(state, prefix, staging.folder)
        packing = Packing(Values(options.values), exact=options.activations == "float")
        stored, files = write_graph(model, parameters, weights, staging.folder, options, prefix, packing)
        sums = Checkpoint(staging.folder).digests() if options.weights == "link" else digests_of(stored)
        if options.weights != "link":
            (staging.folder / WEIGHTS).unlink()
        if config is not None and contract is not None:
            config.save_pretrained(staging.folder)
            write_genai_config(staging.folder, config, contract)
        library = [add_library(staging.folder)] if any(weight.by_ours for weight in stored) else []
        # Read back what was written, so that a full disk is found here and not by the user.
        GraphStore(staging.folder / FILE)
        facts = {**said_of(contract), "transposed": transposed(stored)}
        manifest: dict[str, Any] = {"onnx": {**dataclasses.asdict(options), **facts}}
        write_card(staging.folder, manifest)
        write_manifest(staging.folder, manifest, sums, files)
        staging.commit()
    return [*storage_notes(options, stored, contract), *library]


def _state(graph: fx.GraphModule | ExportedProgram) -> dict[str, Tensor]:
    return dict(graph.state_dict) if isinstance(graph, ExportedProgram) else dict(graph.state_dict(keep_vars=True))


def _names(exported: ExportedProgram) -> tuple[list[str], list[str]]:
    signature = exported.graph_signature
    inputs = [str(name) for name in signature.user_inputs]
    outputs = [f"output_{i}" if i else "output" for i in range(len(signature.user_outputs))]
    return inputs, outputs


def _save_state(state: Mapping[str, Tensor], prefix: str, folder: Path) -> Weights:
    """The graph's tensors in a file of ``folder``, under their names without ``prefix``, shared ones once."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    own: dict[str, Tensor] = {}
    for name, tensor in state.items():
        name = name.removeprefix(prefix)
        if first.setdefault(id(tensor), name) != name:
            aliases[name] = first[id(tensor)]
            continue
        own[name] = tensor.detach().contiguous()
    save_tensors(own, folder / WEIGHTS)
    return Weights(Checkpoint(folder), {name: name for name in own}, aliases=aliases)
