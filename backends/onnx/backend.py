"""The backend ``onnx``: an output folder that transformers, onnxruntime, optimum and onnxruntime-genai all load."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import onnx_ir as ir
import torch

from sparsify.backends.hf import HuggingFaceJob
from sparsify.backends.onnx.contract import Contract
from sparsify.backends.onnx.folder import uniform_heads, write_genai_config, write_json
from sparsify.backends.onnx.graph import OPSETS, Linear, name_dimensions, to_graph
from sparsify.backends.onnx.store import GraphStore
from sparsify.backends.onnx.trace import trace_model
from sparsify.backends.onnx.weights import DATA, Attachment, Mode, StoredWeight
from sparsify.errors import BackendError, SpecError
from sparsify.files.checkpoint import INDEX, Checkpoint
from sparsify.frontend.source import Source
from sparsify.ir.program import Program
from sparsify.ir.store import TensorStore
from sparsify.ir.weights import Weights
from sparsify.words import format_bytes

FILE = "model.onnx"
Dtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class ONNX:
    """The backend ``onnx``.

    Attributes:
        weights: ``link`` points into the safetensors of the folder, ``external`` writes one data file in their place,
            ``packed`` writes zeros as one bit.
        opset: 18 to 24; 23 is the first with attention and normalisation as operators.
        linear: ``gemm`` on weights [out_features, in_features], or ``matmul``.
        dtype: of the stored weights; the checkpoint's own where None.
        compute: of the arithmetic, inputs and outputs. Weights stored otherwise are cast when a session is made.
    """

    weights: Mode = "link"
    opset: int = 23
    linear: Linear = "gemm"
    dtype: Dtype | None = None
    compute: Dtype = "float32"

    name: ClassVar[str] = "onnx"
    needs_pass: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.opset not in OPSETS:
            raise SpecError(
                f"onnx:opset={self.opset}",
                found=f"only opsets {OPSETS[0]} to {OPSETS[-1]} can be written",
                do="Take 23, or 20 for onnxruntime before 1.23 and older TensorRT",
            )
        if self.weights == "link" and self.dtype is not None:
            raise SpecError(
                f"onnx:dtype={self.dtype}",
                found="weights=link points at the checkpoint's own bytes, which have its dtype",
                do="Add weights=external or weights=packed, or drop dtype",
            )

    def open(self, source: Source, out: Path, *, overwrite: bool, program: Program) -> ONNXJob:
        return ONNXJob(self, source, out, overwrite, program)


class ONNXJob:
    """One output folder: the graph is traced first, so that what cannot be exported is refused before any work.

    Raises:
        BackendError: the model has no graph, the folder cannot be written, or unpacking would not fit in memory.
    """

    def __init__(self, backend: ONNX, source: Source, out: Path, overwrite: bool, program: Program) -> None:
        self.backend, self.source = backend, source
        batch = {n.meta["input"]: torch.zeros(n.meta["val"].shape, dtype=n.meta["val"].dtype) for n in program.inputs}
        self.graph, self.parameters, self.contract = build_graph(source.module, batch, backend)
        # Only now: it copies the weights.
        self.hf = HuggingFaceJob(source, out, overwrite)
        self.weights: Weights = self.hf.weights
        self.stored: list[StoredWeight] = []

    def finish(self, program: Program, manifest: dict[str, Any]) -> tuple[Path, Weights]:
        """Write the graph and the files beside it, check them, and put the folder in place."""
        backend, folder = self.backend, self.hf.staging.folder
        sums = self.hf.verify()
        self.stored = write_graph(self.graph, self.parameters, self.weights, folder, backend)
        write_genai_config(folder, self.source.config, self.contract)
        if backend.weights != "link":
            for path in [*self.hf.store.files, folder / INDEX]:
                path.unlink(missing_ok=True)
            if backend.dtype is not None:
                _restate_dtype(folder / "config.json", backend.dtype)
        turned = [w.name for w in self.stored if w.transposed]
        manifest["onnx"] = {
            **dataclasses.asdict(backend),
            "kind": self.contract.kind,
            "transposed": turned,
            "file_bytes": sum(p.stat().st_size for p in folder.iterdir() if p.is_file()),
        }
        # A link has every tensor of the checkpoint, other files only those that the graph reads, as they are stored.
        manifest["checksums"] = sums if backend.weights == "link" else {w.name: w.checksum for w in self.stored}
        path = self.hf.seal(manifest)
        store: TensorStore = Checkpoint(path) if backend.weights == "link" else GraphStore(path / FILE, turned)
        return path, self.weights.on(store)

    def notes(self) -> list[str]:
        """What a user should know of the graph that was written."""
        return storage_notes(self.backend, self.stored, self.contract)

    def __enter__(self) -> ONNXJob:
        return self

    def __exit__(self, *error: Any) -> None:
        self.hf.__exit__(*error)


def build_graph(module: Any, batch: Any, backend: ONNX) -> tuple[ir.Model, dict[str, ir.Value], Contract]:
    """Trace and translate ``module``; the graph's parameters have names and no numbers yet."""
    exported, contract = trace_model(module, batch, getattr(torch, backend.compute))
    model, parameters = to_graph(
        exported, contract.input_names, contract.output_names, opset=backend.opset, linear=backend.linear
    )
    name_dimensions(model, contract.dims)
    return model, parameters, contract


def write_graph(
    model: ir.Model,
    parameters: dict[str, ir.Value],
    weights: Weights,
    folder: Path,
    backend: ONNX,
    prefix: str = "model.",
) -> list[StoredWeight]:
    """Attach the weights and write ``model.onnx``.

    Raises:
        BackendError: packed weights that this machine has not the memory to unpack; see :class:`Attachment`.
    """
    dtype = getattr(torch, backend.dtype) if backend.dtype is not None else None
    attachment = Attachment(model, weights, folder, backend.weights, dtype)
    attachment.attach(parameters, prefix)
    stored = list(attachment.stored.values())
    need = sum(w.unpacking or w.dense_bytes for w in stored)
    if backend.weights == "packed" and need > _physical_memory():
        raise BackendError(
            "exporting packed ONNX",
            found=f"onnxruntime would need some {format_bytes(need)} to unpack it, this machine has "
            f"{format_bytes(_physical_memory())}",
            do="Take weights=link; to ship a smaller file, compress it, which gains nearly as much",
        )
    ir.save(model, folder / FILE)
    return stored


def storage_notes(backend: ONNX, stored: list[StoredWeight], contract: Contract | None) -> list[str]:
    """What the user should know of a graph that was written; ``contract`` is None for a graph of the user's own."""
    total, dense = sum(w.nbytes for w in stored), sum(w.dense_bytes for w in stored)
    kind = contract.kind if contract is not None else "graph"
    notes = [
        f"model.onnx: opset {backend.opset}, {kind}, {len(stored)} weights, {format_bytes(total)} "
        + ("in the safetensors beside it" if backend.weights == "link" else f"in {DATA}")
    ]
    if backend.weights == "packed":
        packed = [w for w in stored if w.format != "dense"]
        need = sum(w.unpacking or w.dense_bytes for w in stored)
        notes.append(
            f"packed: {len(packed)} weights at {total / dense:.3f} of {format_bytes(dense)}; the price: onnxruntime "
            f"needs some {format_bytes(need)} while it loads, and several times longer; sparsify expand makes it dense"
        )
        if not packed:
            notes.append("packed: no weight has enough zeros to gain from it")
    elif any(w.dtype not in (torch.float32, torch.int64) for w in stored) and backend.compute == "float32":
        notes.append("weights are cast to float32 when a session is made: memory is that of float32")
    if backend.weights != "link":
        notes.append("this folder has no safetensors: transformers cannot load it; weights=link writes one that it can")
    if contract is not None and contract.kind == "decoder" and not uniform_heads(contract):
        notes.append(
            "layers or keys and values differ in their cache's shape: onnxruntime and sparsify run take it, "
            "optimum and onnxruntime-genai cannot; no genai_config.json was written"
        )
    large = [w.name for w in stored if math.prod(w.shape) * 4 > 1 << 30 and w.dtype != getattr(torch, backend.compute)]
    if large:
        notes.append(
            f"{', '.join(large[:3])}: over 1 GiB in {backend.compute}, past what onnxruntime folds by default; "
            "sparsify run and genai_config.json raise that (optimization.constant_folding_max_output_size_in_bytes), "
            "other programs must too"
        )
    return notes


def _restate_dtype(path: Path, dtype: str) -> None:
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        config["dtype"] = dtype
        config.pop("torch_dtype", None)
        write_json(path, config)


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
