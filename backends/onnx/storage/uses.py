"""How a graph reads a weight, where that tells how the weight is best stored."""

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
