"""Padding before a pool, kept apart from it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

_POOLS = ("MaxPool", "AveragePool")


def keep_pads(model: ir.Model) -> None:
    """Name the axes of each Pad that a pool reads.

    onnxruntime 1.31 makes such a Pad a part of the pool, whose own padding is minus infinity to a maximum and nothing
    to a mean: zeros beside negative numbers are lost (the stem of BiT). It leaves alone those that name their axes.
    """
    for node in list(model.graph):
        if node.op_type != "Pad" or len(node.inputs) > 3 or not any(n.op_type in _POOLS for n in _readers(node)):
            continue
        pads = ir.convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] is not None else None
        if pads is None:
            continue
        axes = ir.Value(name=f"{node.outputs[0].name}_axes")
        value = ir.tensor(np.arange(pads.size // 2, dtype=np.int64), name=axes.name)
        constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", value)], outputs=[axes])
        node.prepend(constant)
        new = ir.Node(
            "",
            "Pad",
            [*node.inputs, *[None] * (3 - len(node.inputs)), axes],
            node.attributes.values(),
            num_outputs=1,
            name=node.name,
        )
        new.outputs[0].name, new.outputs[0].type = node.outputs[0].name, node.outputs[0].type
        new.outputs[0].shape = node.outputs[0].shape
        node.append(new)
        ir.convenience.replace_all_uses_with(node.outputs[0], new.outputs[0])
        model.graph.remove(node, safe=True)


def _readers(node: ir.Node) -> list[ir.Node]:
    return [use.node for use in node.outputs[0].uses()]
