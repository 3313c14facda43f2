"""What a user should know of a graph that was written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from sparsify.backends.onnx.folder import uniform_heads
from sparsify.backends.onnx.options import Options
from sparsify.backends.onnx.storage.datafile import DATA
from sparsify.backends.onnx.storage.stored import StoredWeight
from sparsify.backends.onnx.tracing.contract import Contract
from sparsify.words import format_bytes

# What a manifest calls a graph that is a part of its model.
LANGUAGE = "language model"
_FOR_QUANTISERS = "give them what onnx:weights=external,dtype=float32,linear=matmul writes"


def storage_notes(options: Options, stored: Sequence[StoredWeight], contract: Contract | None) -> list[str]:
    """What the user should know of a graph that was written; ``contract`` is None for a graph of the user's own."""
    total, dense = sum(w.nbytes for w in stored), sum(w.dense_bytes for w in stored)
    kind = contract.kind if contract is not None else "graph"
    notes = [
        f"model.onnx: opset {options.opset}, {kind}, {len(stored)} weights, {format_bytes(total)} "
        + ("in the safetensors beside it" if options.weights == "link" else f"in {DATA}")
    ]
    if contract is not None:
        notes += _input_notes(contract)
    if options.weights == "packed":
        packed = [w for w in stored if w.format != "dense"]
        need = sum(w.unpacking or w.dense_bytes for w in stored)
        notes.append(
            f"packed: {len(packed)} weights at {total / dense:.3f} of {format_bytes(dense)}; the price: onnxruntime "
            f"needs some {format_bytes(need)} while it loads, and several times longer; sparsify expand makes it dense"
        )
        if not packed:
            notes.append("packed: no weight has enough zeros to gain from it")
    elif options.weights == "sparse":
        notes += _sparse_notes(stored)
    elif any(w.dtype not in (torch.float32, torch.int64) for w in stored) and options.compute == "float32":
        notes.append("weights are cast to float32 when a session is made: memory is that of float32")
        if not (options.weights == "external" and options.dtype == "float32"):
            notes.append(f"onnxruntime's quantisers find no weights behind these casts: {_FOR_QUANTISERS}")
    elif options.weights == "link" and options.linear == "matmul":
        notes.append(f"onnxruntime's quantisers find no weights behind the transposes of links: {_FOR_QUANTISERS}")
    if options.weights != "link":
        notes.append("this folder has no safetensors: transformers cannot load it; weights=link writes one that it can")
    if contract is not None and contract.kind == "decoder" and not uniform_heads(contract):
        notes.append(
            "layers or keys and values differ in their cache's shape: onnxruntime and sparsify run take it, "
            "optimum and onnxruntime-genai cannot; no genai_config.json was written"
        )
    large = [w.name for w in stored if math.prod(w.shape) * 4 > 1 << 30 and w.dtype != getattr(torch, options.compute)]
    if large:
        notes.append(
            f"{', '.join(large[:3])}: over 1 GiB in {options.compute}, past what onnxruntime folds by default; "
            "sparsify run and genai_config.json raise that (optimization.constant_folding_max_output_size_in_bytes), "
            "other programs must too"
        )
    return notes


def _sparse_notes(stored: Sequence[StoredWeight]) -> list[str]:
    sparse = [w for w in stored if w.by_ours]
    if not sparse:
        return ["sparse: no weight of a plain product has zeros enough, or few bits, to gain from it"]
    held, whole = sum(w.nbytes for w in sparse), sum(w.dense_bytes for w in sparse)
    need = sum(w.unpacking or w.dense_bytes for w in stored)
    return [
        f"sparse: {_counted(sparse)} at {held / whole:.3f} of {format_bytes(whole)}, multiplied as they are by "
        "sparsify's operators: sparsify run registers their library, other programs do so by its path in the folder or "
        f"that of sparsify.onnx_library(); without it onnxruntime unpacks them when it opens the file, which takes "
        f"some {format_bytes(need)} and gains no speed"
    ]


def _counted(sparse: Sequence[StoredWeight]) -> str:
    """How many weights, and how many of them as integers."""
    few = Counter(f"int{w.bits}" for w in sparse if w.bits is not None)
    return f"{len(sparse)} weights" + "".join(f" ({count} as {kind})" for kind, count in sorted(few.items()))


def _input_notes(contract: Contract) -> list[str]:
    notes = []
    if contract.kind == "uncached":
        notes.append(
            "no cache (cache=none): every token is computed from the whole text before it; padding goes on the right"
        )
    if contract.media:
        notes.append(
            f"the language model alone: text in, {', '.join(contract.outputs)} out; images, sound and video "
            f"({', '.join(contract.media)}) are not in it"
        )
    for name, value in contract.fixed.items():
        notes.append(
            f"made for {name} {value.tolist()} alone, which decides its sizes: other numbers need another graph"
        )
    if contract.frozen:
        notes.append(
            f"no inputs of the graph, but left at the model's defaults: {', '.join(contract.frozen)} (inputs are what "
            "the folder's tokenizer gives, or calibration batches)"
        )
    if contract.one_length is not None:
        notes.append(f"its sequences are as long as those of calibration ({contract.one_length})")
    if contract.one_row is not None:
        notes.append(f"takes one row at a time, as the model itself does ({contract.one_row})")
    return notes


def said_of(contract: Contract | None) -> dict[str, Any]:
    """What the manifest says of a graph; ``contract`` is None for one of the user's own."""
    if contract is None:
        return {"kind": "graph"}
    said: dict[str, Any] = {"kind": contract.kind, "inputs": list(contract.inputs)}
    if contract.media:
        said["part"] = LANGUAGE
    if contract.frozen:
        said["frozen"] = list(contract.frozen)
    if contract.fixed:
        said["fixed"] = {name: value.tolist() for name, value in contract.fixed.items()}
    return said
