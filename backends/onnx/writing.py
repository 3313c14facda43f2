"""A graph made of a model, and written with its weights."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn

from sparsify.backends.onnx.graph import name_dimensions, to_graph
from sparsify.backends.onnx.options import Options
from sparsify.backends.onnx.products.packing import Packing
from sparsify.backends.onnx.storage.attachment import Attachment
from sparsify.backends.onnx.storage.stored import StoredWeight
from sparsify.backends.onnx.tracing.contract import Contract
from sparsify.backends.onnx.tracing.trace import trace_model
from sparsify.context import Progress, report
from sparsify.errors import BackendError
from sparsify.ir.weights import Weights
from sparsify.words import format_bytes

FILE = "model.onnx"


def build_graph(
    module: nn.Module,
    batch: Mapping[str, Tensor],
    options: Options,
    names: Collection[str] = (),
    fixed: Mapping[str, Tensor] | None = None,
) -> tuple[ir.Model, dict[str, ir.Value], Contract]:
    """Trace and translate ``module``; the graph's parameters have names and no numbers yet.

    Args:
        batch, names: example inputs, and further ones that the model's tokenizer gives.
        fixed: inputs whose numbers decide the model's sizes; the graph holds for them alone.
    """
    report(Progress("exporting", what="the model's graph"))
    exported, contract = trace_model(module, batch, getattr(torch, options.compute), names, options.cache, fixed)
    model, parameters = to_graph(
        exported, contract.input_names, contract.output_names, opset=options.opset, linear=options.linear
    )
    name_dimensions(model, contract.dims)
    return model, parameters, contract


def write_graph(
    model: ir.Model,
    parameters: dict[str, ir.Value],
    weights: Weights,
    folder: Path,
    options: Options,
    prefix: str = "model.",
    packing: Packing | None = None,
) -> tuple[list[StoredWeight], dict[str, str]]:
    """Attach the weights and write ``model.onnx``; what became of each, and the digest of the file that they went to.

    Args:
        packing: of weights=sparse, how.

    Raises:
        BackendError: packed weights that this machine has not the memory to unpack; see :class:`Attachment`.
    """
    dtype = getattr(torch, options.dtype) if options.dtype is not None else None
    attachment = Attachment(model, weights, folder, options.weights, dtype, packing)
    attachment.attach(parameters, prefix)
    stored = list(attachment.stored.values())
    need = sum(w.unpacking or w.dense_bytes for w in stored)
    here = _physical_memory()
    if options.weights == "packed" and need > here:
        raise BackendError(
            "exporting packed ONNX",
            found=f"onnxruntime would need some {format_bytes(need)} to unpack it, this machine has "
            f"{format_bytes(here)}",
            do="Take weights=link; to ship a smaller file, compress it, which gains nearly as much",
        )
    report(Progress("exporting", what=FILE))
    save_graph(model, folder / FILE)
    return stored, attachment.data.digests()


def save_graph(model: ir.Model, file: Path) -> None:
    """Write the graph without the data that lies beside it.

    Shapes of weights are said once, by the weights: tools that turn one round know of no other place to mend.
    """
    proto = ir.to_proto(model)
    graph = proto.graph
    weights = {tensor.name for tensor in graph.initializer}
    others = [value for value in graph.value_info if value.name not in weights]
    del graph.value_info[:]
    graph.value_info.extend(others)
    file.write_bytes(proto.SerializeToString())


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
