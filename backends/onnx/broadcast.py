"""Operators of ONNX that want their operands whole, where torch stretches an axis of 1 to what is beside it.

What a model makes for itself (positions, the turns of rotary embeddings, masks) mostly has one row for all rows of the
batch. Most operators of ONNX stretch that row as torch does; those here do not, and run with a batch of one alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch

aten = torch.ops.aten


def spread_attention(exported: torch.export.ExportedProgram) -> None:
    """Give the operands of an attention one number of rows, and keys and values as many heads as queries have."""
    graph = exported.graph
    for node in graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        operands = node.args[:3]
        most = next((o for o in operands if o.meta["val"].shape[0] != 1), operands[0])
        for at, old in enumerate(operands):
            value = old.meta["val"]
            few = value.shape[0] == 1 and most is not old and most.meta["val"].shape[0] != 1
            heads = operands[0].meta["val"].shape[1]
            alone = value.shape[1] == 1 and heads != 1
            if not few and not alone:
                continue
            size = [most.meta["val"].shape[0] if few else value.shape[0], heads if alone else value.shape[1]]
            with graph.inserting_before(node):
                rows: Any = -1
                if few:
                    rows = graph.call_function(aten.sym_size.int, (most, 0))
                    rows.meta["val"] = size[0]
                new = graph.call_function(aten.expand.default, (old, [rows, heads if alone else -1, -1, -1]))
            new.meta["val"] = value.expand(*size, *value.shape[2:])
            node.update_arg(at, new)


def spread_masks(exported: torch.export.ExportedProgram) -> None:
    """Give the mask of an attention a row for every query where it has one for all: the operator wants that."""
    graph = exported.graph
    for node in graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        queries = node.args[0]
        if mask is None or mask.meta["val"].dim() < 2 or mask.meta["val"].shape[-2] != 1:
            continue
        if (length := queries.meta["val"].shape[-2]) == 1:
            continue
        value = mask.meta["val"]
        keep = [-1] * (value.dim() - 2)
        with graph.inserting_before(node):
            rows = graph.call_function(aten.sym_size.int, (queries, 2))
            rows.meta["val"] = length
            new = graph.call_function(aten.expand.default, (mask, [*keep, rows, -1]))
        new.meta["val"] = value.expand(*keep, length, -1)
        if len(node.args) > 3:
            node.update_arg(3, new)
        else:
            node.update_kwarg("attn_mask", new)


def stretch_rotations(model: ir.Model) -> None:
    """Give every ``RotaryEmbedding`` a row of cosines and sines for each row of what it turns.

    Without positions of its own the operator takes them as [batch, sequence, half of the head's size], and no other
    shape: not one row for all, which is what positions that a model counts for itself make.
    """
    for node in [n for n in model.graph.all_nodes() if n.op_type == "RotaryEmbedding"]:
        turned, *caches = node.inputs[:3]
        if len(node.inputs) > 3 or turned is None or turned.shape is None or len(turned.shape) != 4:
            continue
        rows = turned.shape[0]
        for at, cache in enumerate(caches, 1):
            assert cache is not None
            shape = _shape(cache)
            if shape is None or shape[0] != rows:
                node.replace_input_with(at, _stretched(model.graph, node, turned, cache))


def _shape(value: ir.Value) -> ir.Shape | None:
    """The shape of ``value``, which for a cosine or sine that a rewrite has just made is that of its angle."""
    made = value.producer()
    if value.shape is None and made is not None and made.op_type in ("Cos", "Sin") and made.inputs[0] is not None:
        return made.inputs[0].shape
    return value.shape


def _stretched(graph: ir.Graph, before: ir.Node, turned: ir.Value, cache: ir.Value) -> ir.Value:
    one = ir.node("Constant", [], attributes={"value": ir.tensor(np.array([1], np.int64))})
    # [batch, heads, sequence, size] is turned by [batch, sequence, half]; a size of 1 stretches to any.
    rows = ir.node("Shape", [turned], attributes={"start": 0, "end": 1})
    length = ir.node("Shape", [turned], attributes={"start": 2, "end": 3})
    wanted = ir.node("Concat", [rows.outputs[0], length.outputs[0], one.outputs[0]], attributes={"axis": 0})
    stretch = ir.node("Expand", [cache, wanted.outputs[0]])
    graph.insert_before(before, [one, rows, length, wanted, stretch])
    stretch.outputs[0].dtype = turned.dtype
    return stretch.outputs[0]
