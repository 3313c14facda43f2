"""``sparsify expand``: from a packed folder to a dense one with one copy of the weights, a tensor at a time."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import onnx_ir as ir
import onnx_ir.passes.common as common

from sparsify.backends.onnx.products.bodies import DOMAIN, EXPERTS, OPERATORS
from sparsify.backends.onnx.products.library import without_library
from sparsify.backends.onnx.products.sparse import put
from sparsify.backends.onnx.products.stacks import expand_experts, names_held
from sparsify.backends.onnx.running.session import find_onnx
from sparsify.backends.onnx.storage.datafile import external
from sparsify.backends.onnx.storage.store import GraphStore
from sparsify.backends.onnx.writing import save_graph
from sparsify.context import counted
from sparsify.errors import BackendError, CheckpointError, SparsifyError, first_line
from sparsify.files.checkpoint import WEIGHTS, Checkpoint
from sparsify.files.companions import check_companions, copy_companions
from sparsify.files.ledger import Ledger, write_manifest
from sparsify.files.manifest import section
from sparsify.files.staging import Staging
from sparsify.files.writer import lay_out_files
from sparsify.provenance.card import write_card
from sparsify.provenance.carried import in_another_form
from sparsify.provenance.history import restated


def expand(
    folder: Path, out: Path | None = None, *, overwrite: bool = False, check: bool = True, allow_nan: bool = False
) -> Path:
    """Write the packed ``folder`` dense: a safetensors file, and ``model.onnx`` pointing into it.

    Args:
        out: where; in place of ``folder`` where None. check: hold every byte against the folder's ``sparsify.json``.
        allow_nan: let NaN and infinity pass.

    Raises:
        BackendError: nothing in it is packed, or the output cannot be written.
        CheckpointError: no sound ONNX file, or not what was written.
    """
    file = find_onnx(folder)
    folder = file.parent
    ledger = Ledger.of(folder, check, finite=not allow_nan)
    if ledger.manifest:
        check_companions(folder, ledger)
    turned = section(ledger.manifest, "onnx").get("transposed", ())
    store = GraphStore(file, turned if isinstance(turned, list) else (), ledger=ledger)
    if not store.packed:
        raise BackendError(f"expanding {folder}", found="no packed weight in it", do="It is dense already")
    names = list(store.names())
    need = sum(store.shape(n).numel() * store.dtype(n).itemsize for n in names)
    place = out if out is not None else folder
    in_place = place.absolute() == folder.absolute()
    source = None if in_place else folder
    with Staging(place, overwrite=overwrite or in_place, source=source, like=folder, need=need) as staging:
        copy_companions(folder, staging.folder, written="*.onnx")
        without_library(folder, staging.folder)
        # One file, whatever its size: the graph points into it.
        layout = {WEIGHTS: {name: (store.dtype(name), list(store.shape(name))) for name in names}}
        dense = lay_out_files(staging.folder, layout)
        for name in counted("unpacking", names):
            dense.write(name, store.read(name))
        try:
            _relink(store, staging.folder, file.name)
        except (SparsifyError, OSError):
            raise
        except Exception as error:  # onnx_ir refuses a graph that breaks rules in many ways
            raise CheckpointError(
                f"ONNX file {file}", found=f"a graph that breaks a rule ({first_line(error)})", do="Export it again"
            ) from error
        if ledger.manifest:
            onnx = {**section(ledger.manifest, "onnx"), "weights": "link", "dtype": None, "transposed": []}
            changed = {**in_another_form(ledger.manifest), "onnx": onnx, "source_check": ledger.checked}
            changed |= {"history": restated(ledger.manifest, "expand")} | ({"allow_nan": True} if allow_nan else {})
            write_card(staging.folder, changed)
            write_manifest(staging.folder, changed, dense.written)
        return staging.commit()


def _relink(store: GraphStore, folder: Path, name: str) -> None:
    """The same graph with every weight an initializer that lies in the folder's safetensors."""
    model = ir.load(store.file)
    graph = model.graph
    written, dense = Checkpoint(folder), dict[str, ir.ExternalTensor]()
    values = {v.name: v for n in graph for v in n.outputs} | dict(graph.initializers)
    for weight in store.names():
        path, start, size = written.span(weight)
        tensor = external(path, start, size, written.dtype(weight), written.shape(weight), weight)
        if weight in store.sparse:
            dense[weight] = tensor
            continue
        old = values[weight]
        if weight in graph.initializers:
            graph.initializers[weight].const_value = tensor
            continue
        old.name = f"{weight}/unpacked"
        old.replace_all_uses_with(_dense(graph, tensor, old.dtype))
    _multiply_dense(graph, dense, store.transposed)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    save_graph(model, folder / name)


def _dense(graph: ir.Graph, tensor: ir.ExternalTensor, wanted: ir.DataType | None) -> ir.Value:
    """A stored tensor of ``graph``, cast where it computes in another dtype."""
    weight = tensor.name
    fresh = ir.Value(name=weight, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)
    graph.register_initializer(fresh)
    if wanted is None or wanted == tensor.dtype:
        return fresh
    cast = ir.node("Cast", [fresh], attributes={"to": wanted})
    result = cast.outputs[0]
    result.name, result.dtype, result.shape = f"{weight}/{wanted.name.lower()}", wanted, tensor.shape
    graph.insert_before(next(iter(graph)), cast)
    return result


def _multiply_dense(graph: ir.Graph, dense: Mapping[str, ir.ExternalTensor], transposed: Collection[str]) -> None:
    """Put standard operators over ``dense`` in the place of ours."""
    made: dict[str, ir.Value] = {}
    for node in [node for node in graph if node.domain == DOMAIN and node.op_type in OPERATORS]:
        names = names_held(node)
        for name in names:
            if name not in made:
                made[name] = _dense(graph, dense[name], node.outputs[0].dtype)
        if node.op_type in EXPERTS:
            expand_experts(graph, node, [made[n] for n in names], in_first=bool({*names} & {*transposed}))
            continue
        bias = node.inputs[1 + len(OPERATORS[node.op_type].parts) :]
        inputs = [node.inputs[0], made[names[0]], *(b for b in bias if b is not None)]
        turned = {} if names[0] in transposed else {"transB": 1}
        put(graph, node, ir.node("Gemm", inputs, attributes=turned, name=node.name))
