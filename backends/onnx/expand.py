"""``sparsify expand``: from a packed folder to a dense one with one copy of the weights, a tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir
import onnx_ir.passes.common as common
from sparsify.backends.hf import MANIFEST
from sparsify.backends.onnx.folder import write_json
from sparsify.backends.onnx.runner import find_onnx
from sparsify.backends.onnx.store import GraphStore
from sparsify.backends.onnx.weights import DATA, external
from torch import Tensor

from sparsify.checkpoint import DTYPES, WEIGHTS, Checkpoint
from sparsify.errors import BackendError
from sparsify.raw import checksum, write_from
from sparsify.staging import Staging

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def expand(folder: Path, out: Path | None = None, *, overwrite: bool = False) -> Path:
    """Write the packed ``folder`` dense: a safetensors file, and ``model.onnx`` pointing into it.

    Args:
        out: where; in place of ``folder`` where None.

    Raises:
        BackendError: nothing in it is packed, or the output cannot be written.
        CheckpointError: no sound ONNX file.
    """
    file = find_onnx(folder)
    folder = file.parent
    store = GraphStore(file)
    if not store.packed:
        raise BackendError(f"expanding {folder}", found="no packed weight in it", do="It is dense already")
    names = list(store.names())
    need = sum(store.shape(n).numel() * store.dtype(n).itemsize for n in names)
    place = out if out is not None else folder
    in_place = place.absolute() == folder.absolute()
    with Staging(place, overwrite=overwrite or in_place, source=None if in_place else folder, need=need) as staging:
        for path in folder.iterdir():
            if path.is_file() and path.name not in (file.name, DATA, MANIFEST):
                shutil.copyfile(path, staging.folder / path.name)
        sums = write_safetensors(staging.folder / WEIGHTS, store, names)
        _relink(store, staging.folder, file.name)
        if (folder / MANIFEST).is_file():
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            manifest["checksums"] = sums
            manifest.get("onnx", {}).update(weights="link", dtype=None)
            write_json(staging.folder / MANIFEST, manifest)
        return staging.commit()


def write_safetensors(path: Path, store: GraphStore, names: Sequence[str]) -> dict[str, int]:
    """Write the tensors ``names`` of ``store`` one after the other; the CRC-32 of each.

    The library would hold all of them at once.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        shape, dtype = store.shape(name), store.dtype(name)
        size = shape.numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sums = {}
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        at = 8 + len(text)
        for name in names:
            tensor: Tensor = store.read(name).contiguous()
            write_from(file.fileno(), tensor, at)
            sums[name] = checksum(tensor)
            at += tensor.numel() * tensor.element_size()
    return sums


def _relink(store: GraphStore, folder: Path, name: str) -> None:
    """The same graph with every weight an initializer that lies in the folder's safetensors."""
    model = ir.load(store.file)
    graph = model.graph
    dense = Checkpoint(folder)
    values = {v.name: v for n in graph for v in n.outputs} | dict(graph.initializers)
    for weight in store.names():
        path, start, size = dense.span(weight)
        tensor = external(path, start, size, dense.dtype(weight), dense.shape(weight), weight)
        old = values[weight]
        if weight in graph.initializers:
            graph.initializers[weight].const_value = tensor
            continue
        fresh = ir.Value(name=weight, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)
        wanted = old.dtype
        old.name = f"{weight}/unpacked"
        result = fresh
        if wanted is not None and wanted != tensor.dtype:
            cast = ir.node("Cast", [fresh], attributes={"to": wanted})
            result = cast.outputs[0]
            result.name, result.dtype, result.shape = f"{weight}/{wanted.name.lower()}", wanted, tensor.shape
            graph.insert_before(next(iter(graph)), cast)
        graph.register_initializer(fresh)
        old.replace_all_uses_with(result)
    common.RemoveUnusedNodesPass()(model)
    ir.save(model, folder / name)
