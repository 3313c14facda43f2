"""``export_onnx``: the exporter for Python, on models and on graphs that other passes have edited."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from sparsify.backends.onnx.backend import ONNX
from sparsify.backends.onnx.edited import TracedModel, export_graph
from sparsify.backends.onnx.options import Cache
from sparsify.backends.onnx.retrace import Example
from sparsify.backends.onnx.tracing.trace import trace_model
from sparsify.compiler.pipeline import compile
from sparsify.data.batches import example_batch
from sparsify.errors import BackendError
from sparsify.frontend.source import open_source
from sparsify.ir.graph import set_tensor


@dataclass(frozen=True)
class ExportReport:
    """What was written: the folder, and sentences for the user about what is in it."""

    output: Path
    notes: list[str]


def trace_onnx(model: nn.Module, cache: Cache = "keep") -> TracedModel:
    """Trace ``model`` (a transformers model) as the graph that would be exported, with its real weights in it.

    Args:
        cache: as for :class:`ONNX`.

    Raises:
        BackendError: it cannot be traced with dynamic shapes.
    """
    exported, contract = trace_model(model, _example(model), None, cache=cache)
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
    example_inputs: Example | None = None,
    overwrite: bool = False,
    allow_nan: bool = False,
    **options: Any,
) -> ExportReport:
    """Write ``model`` as an ONNX folder.

    Args:
        model: a Hugging Face folder or module, written with its config and tokenizer; or a graph (what
            :func:`trace_onnx` gave, any ``GraphModule`` or ``ExportedProgram``), exported as it is now.
        backend: its options; or give them as keywords (``weights="packed"``, see :class:`ONNX`).
        example_inputs: for modules and GraphModules whose inputs are not known: tensors whose first dimension is
            the batch.
        allow_nan: let NaN and infinity in its tensors pass.

    Raises:
        BackendError: it has no ONNX form, or the graph is stale: its parameters were changed in shape and its
            operators were not. Nothing is written then.
    """
    backend = backend or ONNX(**options)
    if isinstance(model, (TracedModel, fx.GraphModule, ExportedProgram)):
        example = None if isinstance(model, TracedModel) else example_inputs
        notes = export_graph(model, Path(out), backend, example=example, overwrite=overwrite, allow_nan=allow_nan)
        return ExportReport(Path(out), notes)
    if not isinstance(model, (str, Path, nn.Module)):
        raise BackendError(
            f"exporting a {type(model).__name__}",
            found="neither a model nor a graph of torch",
            do="Give a folder, a module, a GraphModule or an ExportedProgram; of a Compiled its output or its model",
        )
    batches = None
    if example_inputs is not None:
        batches = [dict(example_inputs) if isinstance(example_inputs, Mapping) else tuple(example_inputs)]
    result = compile(model, [], calibration=batches, to=backend, output=out, overwrite=overwrite, allow_nan=allow_nan)
    assert result.output is not None
    return ExportReport(result.output, result.notes)


def _example(model: nn.Module) -> dict[str, Tensor]:
    source = open_source(model, allow_nan=True)
    return example_batch(source) if source.is_transformers else {}
