"""What torch's exporter has no operator of ONNX for, in an exported program, said in others that it knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

aten = torch.ops.aten

# Of complex numbers, whose axes are those of their pairs of real ones without the last.
_SHAPING = (aten.unsqueeze.default, aten.slice.Tensor, aten.select.int)


def settle(exported: torch.export.ExportedProgram) -> None:
    """Rewrite the graph of ``exported`` in place."""
    for node in list(exported.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten.erfinv.default:
            _known(exported, node)
        elif node.target in (aten.repeat_interleave.self_Tensor, aten.repeat_interleave.self_int):
            # How long it comes out is told for speed alone: it follows from the rest.
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "output_size"}
        elif node.target is aten._is_all_true.default:
            node.target = aten.all.default
        elif node.target is aten.conv3d.default and (len(node.args) < 3 or node.args[2] is None):
            _with_bias(exported.graph, node)
        elif node.target in _SHAPING and _complex(node.args[0]):
            _as_pairs(exported.graph, node)


def _complex(node: Any) -> bool:
    value = getattr(node, "meta", {}).get("val")
    return isinstance(value, Tensor) and value.is_complex()


def _as_pairs(graph: fx.Graph, node: fx.Node) -> None:
    """New axes and pieces of complex numbers (rotations of Llama 4 and DeepSeek V2), of pairs of real numbers."""
    old, *rest = node.args
    assert isinstance(old, fx.Node)
    axis = int(rest[0]) if rest else 0  # type: ignore[arg-type]
    # From the end there is one more axis to count.
    rest = [axis - 1 if axis < 0 else axis, *rest[1:]]
    with graph.inserting_before(node):
        pairs = graph.call_function(aten.view_as_real.default, (old,))
        pairs.meta["val"] = torch.view_as_real(old.meta["val"])
        shaped = graph.call_function(node.target, (pairs, *rest), node.kwargs)  # type: ignore[arg-type]
        shaped.meta["val"] = node.target(pairs.meta["val"], *rest, **node.kwargs)  # type: ignore[operator]
        again = graph.call_function(aten.view_as_complex.default, (shaped,))
    again.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(again)
    graph.erase_node(node)


def _with_bias(graph: fx.Graph, node: fx.Node) -> None:
    """A bias of zeros for a convolution that has none: onnxscript gives it one of two axes."""
    value, given = node.meta["val"], dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
    with graph.inserting_before(node):
        zeros = graph.call_function(aten.full.default, ([int(value.shape[1])], 0.0), {"dtype": value.dtype})
    zeros.meta["val"] = value.new_zeros(int(value.shape[1]))
    node.args = (given.pop("input"), given.pop("weight"), zeros, *node.args[3:])
    node.kwargs = {key: each for key, each in given.items() if key != "bias"}


def _known(exported: torch.export.ExportedProgram, node: fx.Node) -> None:
    """A number that is made of constants alone (the sparsity of Gemma 3n's activations), computed here."""
    value = _evaluate(exported, node, {})
    if value is None or value.numel() != 1:
        return
    graph = exported.graph
    with graph.inserting_before(node):
        new = graph.call_function(aten.full.default, (list(value.shape), value.item()), {"dtype": value.dtype})
    new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _evaluate(exported: torch.export.ExportedProgram, node: fx.Node, done: dict[fx.Node, Tensor | None]) -> Any:
    """The tensor that ``node`` is, None where that takes an input or a weight."""
    if node in done:
        return done[node]
    if node.op == "placeholder":
        name = exported.graph_signature.inputs_to_lifted_tensor_constants.get(node.name)
        value = exported.constants.get(name) if name is not None else None
        done[node] = value if isinstance(value, Tensor) and not isinstance(value, FakeTensor) else None
        return done[node]
    given = {argument: _evaluate(exported, argument, done) for argument in node.all_input_nodes}
    if node.op != "call_function" or any(value is None for value in given.values()):
        return None
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), given.__getitem__)
    done[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return done[node]
