"""An ONNX folder: the graph is traced first, so that what cannot be exported is refused before any work."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from sparsify.backends.hf.job import HuggingFaceJob
from sparsify.backends.hf.notes import source_notes
from sparsify.backends.onnx.folder import write_genai_config
from sparsify.backends.onnx.notes import said_of, storage_notes
from sparsify.backends.onnx.options import Options
from sparsify.backends.onnx.products.library import add_library
from sparsify.backends.onnx.products.packing import Packing
from sparsify.backends.onnx.products.rounding import round_products
from sparsify.backends.onnx.storage.store import GraphStore
from sparsify.backends.onnx.storage.stored import StoredWeight, digests_of, transposed
from sparsify.backends.onnx.tracing.signature import tensor_inputs
from sparsify.backends.onnx.writing import FILE, build_graph, write_graph
from sparsify.backends.packed.grids import Values
from sparsify.backends.packed.job import was_rounded
from sparsify.backends.packed.plan import rounding_note
from sparsify.errors import CheckpointError
from sparsify.files.checkpoint import INDEX, Checkpoint
from sparsify.files.companions import rewrite_config
from sparsify.frontend.source import Source
from sparsify.ir.program import Program
from sparsify.ir.store import TensorStore
from sparsify.ir.weights import Weights


class ONNXJob:
    """One output folder: the graph is traced first, so that what cannot be exported is refused before any work.

    Raises:
        BackendError: the model has no graph, the folder cannot be written, or unpacking would not fit in memory.
    """

    def __init__(self, options: Options, source: Source, out: Path, *, overwrite: bool, program: Program) -> None:
        self.options, self.source = options, source
        names = _tokenizer_inputs(source)
        self.graph, self.parameters, self.contract = build_graph(
            source.module, program.zero_batch(), options, names, program.literals
        )
        # Only now: it copies the weights.
        self.hf = HuggingFaceJob(source, out, overwrite=overwrite)
        self.weights: Weights = self.hf.weights
        self.stored: list[StoredWeight] = []
        self.rounding: list[float] = []
        self.library: str | None = None
        self._settled = False

    def settle(self, program: Program) -> None:
        """Round what is to be rounded, before the result is judged or its numbers are told."""
        self._settled, values = True, Values(self.options.values, self.options.group)
        if values.rounds:
            self.rounding = round_products(values, program, self.parameters, self.weights)

    def finish(self, program: Program, manifest: dict[str, Any]) -> tuple[Path, Weights]:
        """Write the graph and the files beside it, check them, and put the folder in place."""
        options, folder = self.options, self.hf.staging.folder
        sums = self.hf.verify()
        if not self._settled:
            self.settle(program)
        values = Values(options.values, options.group, meant=was_rounded(manifest))
        packing = Packing(values, exact=options.activations == "float")
        self.stored, files = write_graph(self.graph, self.parameters, self.weights, folder, options, packing=packing)
        write_genai_config(folder, self.source.config, self.contract)
        if any(weight.by_ours for weight in self.stored):
            self.library = add_library(folder)
        linked = options.weights == "link"
        if not linked:
            for path in [*self.hf.store.files, folder / INDEX]:
                path.unlink(missing_ok=True)
        if options.dtype is not None and (folder / "config.json").is_file():
            rewrite_config(folder, self._restated)
        turned = transposed(self.stored)
        manifest["onnx"] = {
            **dataclasses.asdict(options),
            **said_of(self.contract),
            "transposed": turned,
            "file_bytes": sum(p.stat().st_size for p in folder.iterdir() if p.is_file()),
        }
        # A link has every tensor of the checkpoint, other files only those that the graph reads, as they are stored.
        path = self.hf.seal(manifest, sums if linked else digests_of(self.stored), files)
        store: TensorStore = Checkpoint(path) if linked else GraphStore(path / FILE, turned)
        return path, self.weights.on(store)

    def _restated(self, config: dict[str, Any]) -> dict[str, Any]:
        """config.json with the dtype that the weights are stored in."""
        return {key: value for key, value in {**config, "dtype": self.options.dtype}.items() if key != "torch_dtype"}

    def notes(self) -> list[str]:
        """What a user should know of the graph that was written."""
        kept = "in model.safetensors and not in the graph" if self.options.weights == "link" else "not in the graph"
        own = storage_notes(self.options, self.stored, self.contract)
        own += [self.library] if self.library is not None else []
        own += [rounding_note(self.rounding)] if self.rounding else []
        return [*source_notes(self.source, kept), *own]

    def __enter__(self) -> ONNXJob:
        return self

    def __exit__(self, *error: Any) -> None:
        self.hf.__exit__(*error)


def _tokenizer_inputs(source: Source) -> list[str]:
    """What the folder's tokenizer gives to the model; nothing where there is none."""
    if source.folder is None or not set(tensor_inputs(source.module)) - {"input_ids", "attention_mask"}:
        return []
    try:
        return list(source.tokenizer().model_input_names)
    except CheckpointError:
        # The notes name what is left at its default.
        return []
