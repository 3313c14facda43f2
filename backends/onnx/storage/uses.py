"""How a graph reads a weight, where that tells how the weight is best stored, or read."""

from __future__ import annotations

import onnx_ir as ir


def transposes(value: ir.Value) -> list[ir.Node]:
    """The nodes that read ``value``, where each is a transpose of a matrix; else none."""
    nodes = [use.node for use in value.uses()]
    plain = all(n.op_type == "Transpose" and list(n.attributes["perm"].as_ints()) == [1, 0] for n in nodes)
    return nodes if plain else []


def gathered_only(value: ir.Value) -> bool:
    """Whether ``value`` is a table that is only looked up in."""
    return all(use.node.op_type == "Gather" and use.idx == 0 for use in value.uses())


def cast_after_gather(graph: ir.Graph, stored: ir.Value, value: ir.Value) -> None:
    """Look embeddings up as stored and convert the rows alone: the table is never held twice."""
    wanted = value.dtype
    assert wanted is not None
    for use in list(value.uses()):
        node = use.node
        node.replace_input_with(0, stored)
        rows = node.outputs[0]
        cast = ir.node("Cast", [rows], attributes={"to": wanted})
        cast.outputs[0].name = f"{rows.name}/cast"
        cast.outputs[0].shape, cast.outputs[0].dtype = rows.shape, wanted
        rows.replace_all_uses_with(cast.outputs[0], replace_graph_outputs=True)
        cast.replace_input_with(0, rows)
        rows.dtype = stored.dtype
        graph.insert_after(node, cast)


def mark_shared(graph: ir.Graph) -> None:
    """Mark each ``Gemm`` whose turned weight others read as well, by ``beta=0``: it has no summand that this scales.

    onnxruntime's quantisers make a MatMul of a Gemm and turn the weight itself round, whoever else reads it (embeddings
    under a tied head, layers that share their weights): those would read nonsense, without an error. They leave a Gemm
    alone whose ``beta`` is not 1. A bias becomes a ``Sum``, which onnxruntime takes back in when it opens the file.
    """
    for node in [n for n in graph if n.op_type == "Gemm"]:
        weight = node.inputs[1]
        turned = "transB" in node.attributes and node.attributes["transB"].as_int() == 1
        if weight is None or not turned or len(weight.uses()) == 1:
            continue
        attributes = {**node.attributes, "beta": ir.AttrFloat32("beta", 0.0)}
        product = ir.Node("", "Gemm", node.inputs[:2], attributes.values(), name=node.name)
        made = [product]
        out, old = product.outputs[0], node.outputs[0]
        if len(node.inputs) > 2:
            out.name, out.dtype, out.shape = f"{old.name}/product", old.dtype, old.shape
            made.append(ir.node("Sum", [out, node.inputs[2]], name=f"{node.name}/sum"))
            out = made[-1].outputs[0]
        out.name, out.dtype, out.shape = old.name, old.dtype, old.shape
        graph.insert_before(node, made)
        old.replace_all_uses_with(out, replace_graph_outputs=True)
        graph.remove(node, safe=True)
