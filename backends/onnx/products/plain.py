"""Products that a model writes as ``x @ weight`` or ``x @ weight.T``, as the 2-D Gemm that a linear layer is."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from sparsify.backends.onnx.products.sparse import put
from sparsify.backends.onnx.storage.builder import Builder


def as_gemms(build: Builder, weights: Iterable[ir.Value]) -> None:
    """Put a Gemm between two Reshapes in the place of each MatMul with a matrix of ``weights``, as it is or turned."""
    for weight in weights:
        if weight.shape is None or len(weight.shape) != 2 or not weight.shape.is_static():
            continue
        for read in [use.node for use in weight.uses()]:
            if _multiplies(read, weight):
                _replace(build, read, weight, turned=False)
                continue
            for node in [use.node for use in read.outputs[0].uses()] if _turns(read) else []:
                if _multiplies(node, read.outputs[0]):
                    _replace(build, node, weight, turned=True)
            if _turns(read) and not read.outputs[0].uses():
                build.graph.remove(read, safe=True)


def _turns(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [1, 0]


def _multiplies(node: ir.Node, matrix: ir.Value) -> bool:
    x = node.inputs[0]
    plain = node.op_type == "MatMul" and node.inputs[1] is matrix and x is not matrix
    return plain and x is not None and x.shape is not None and len(x.shape) >= 2


def _replace(build: Builder, node: ir.Node, weight: ir.Value, *, turned: bool) -> None:
    x, old = node.inputs[0], node.outputs[0]
    assert x is not None and x.shape is not None and weight.shape is not None
    rows, columns = list(weight.shape.numpy()) if turned else list(reversed(weight.shape.numpy()))
    flat = build.constant(f"shape.-1x{columns}", np.array([-1, columns], np.int64))
    width = build.constant(f"shape.{rows}", np.array([rows], np.int64))
    tokens = ir.node("Reshape", [x, flat])
    product = ir.node("Gemm", [tokens.outputs[0], weight], attributes={"transB": 1} if turned else {}, name=node.name)
    lead = ir.node("Shape", [x], attributes={"start": 0, "end": -1})
    shape = ir.node("Concat", [lead.outputs[0], width], attributes={"axis": 0})
    for made, what, sizes, kind in (
        (tokens, "tokens", [None, columns], x.dtype),
        (product, "product", [None, rows], old.dtype),
        (lead, "lead", [len(x.shape) - 1], ir.DataType.INT64),
        (shape, "shape", [len(x.shape)], ir.DataType.INT64),
    ):
        out = made.outputs[0]
        out.name, out.shape, out.dtype = f"{old.name}/{what}", ir.Shape(sizes), kind
    build.graph.insert_before(node, [tokens, product, lead, shape])
    put(build.graph, node, ir.node("Reshape", [product.outputs[0], shape.outputs[0]]))
