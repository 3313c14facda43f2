"""What onnxruntime makes of a graph's weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir
import torch
from torch import Tensor

from sparsify.backends.onnx.products.sparse import unpacked_values
from sparsify.backends.onnx.running.session import open_session
from sparsify.backends.onnx.storage.store import GraphStore
from sparsify.errors import BackendError, SparsifyError, first_line

# Weights asked of onnxruntime at once: enough to be quick, little beside a model.
_AT_ONCE = 256 << 20


def runtime_weights(store: GraphStore, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Each weight as a session gives it back: cast, joined and unpacked by onnxruntime's own operators.

    Where the graph converts a stored tensor, what comes is the converted one.

    Raises:
        BackendError: onnxruntime cannot load them.
    """
    part: list[str] = []
    size = 0
    for name in names:
        part.append(name)
        size += store.shape(name).numel() * 4
        if size > _AT_ONCE:
            yield from _given(store, part)
            part, size = [], 0
    if part:
        yield from _given(store, part)


def _given(store: GraphStore, names: list[str]) -> list[tuple[str, Tensor]]:
    try:
        return list(_ask(store, names))
    except SparsifyError:
        raise
    except Exception as error:  # onnx_ir and onnxruntime refuse a graph that breaks rules in many ways
        raise BackendError(
            f"asking onnxruntime for the weights of {store.file.name}",
            found=f"the graph breaks a rule ({first_line(error)})",
            do="Export it again",
        ) from error


def _ask(store: GraphStore, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    # A fresh graph, for the nodes are moved out of it; its weights stay where they are, in the folder.
    model = ir.load(store.file)
    graph = model.graph
    by_name = {v.name: v for n in graph for v in n.outputs} | dict(graph.initializers)
    by_name |= unpacked_values(graph, {name: store.lies(name) for name in names if name in store.sparse})
    outputs: list[ir.Value] = []
    asked: dict[str, str] = {}
    for name in names:
        value = by_name[name]
        cast = next((c for c in value.consumers() if c.op_type == "Cast" and value.dtype == ir.DataType.BFLOAT16), None)
        if cast is None and value.dtype == ir.DataType.BFLOAT16:
            # numpy has no bfloat16; every one of its values is a float32.
            cast = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT})
            graph.append(cast)
        out = value
        if cast is not None:
            out = cast.outputs[0]
        if out.producer() is None:
            same = ir.node("Identity", [out])
            graph.append(same)
            same.outputs[0].dtype, same.outputs[0].shape = out.dtype, out.shape
            out = same.outputs[0]
        out.name = f"weight_{len(outputs)}"
        if out.dtype is None:
            out.dtype = ir.DataType.FLOAT
        asked[out.name] = name
        outputs.append(out)
    graph.outputs.clear()
    graph.outputs.extend(outputs)
    graph.inputs.clear()
    needed: set[ir.Node] = set()
    todo = [o.producer() for o in outputs]
    while todo:
        node = todo.pop()
        if node is not None and node not in needed:
            needed.add(node)
            todo += [v.producer() for v in node.inputs if v is not None]
    # Not safely, as that is called: loops that go with the rest still read what lies outside them.
    graph.remove([n for n in graph if n not in needed])
    used = {v.name for n in needed for v in n.inputs if v is not None}
    for name in [n for n in graph.initializers if n not in used]:
        graph.initializers.pop(name)
    # Our operators are asked what they say that they compute; what our library makes of it the outputs tell.
    session = open_session(ir.to_proto(model).SerializeToString(), folder=store.file.parent)
    for out_name, array in zip(asked, session.run(list(asked), {}), strict=True):
        yield asked[out_name], torch.from_numpy(array)
