"""Products with packed weights as operators of the domain ``sparsify``, which our library gives to onnxruntime.

Each operator is a function of standard ones in the file too: whoever has no library computes the same with dense
weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import torch

from sparsify.backends.onnx.products.bodies import DOMAIN, EXPERTS, OPERATORS, Form, functions_of
from sparsify.runtime.layout import Packed


def reading_products(value: ir.Value) -> list[ir.Node]:
    """The nodes that read the weight ``value``, where each is a plain product with it, all of one layout; else none."""
    nodes = [use.node for use in value.uses()]
    ways = {_way(node, value) for node in nodes}
    return nodes if len(ways) == 1 and None not in ways else []


def is_turned(node: ir.Node) -> bool:
    """Whether a Gemm reads its weight as [out_features, in_features]."""
    return "transB" in node.attributes and node.attributes["transB"].as_int() == 1


def form_of(packed: Packed) -> Form:
    return Form(packed.layout, packed.bits)


def parts_of(node: ir.Node) -> dict[str, ir.Value]:
    """The inputs of our operator ``node`` that hold its weight, by what they are."""
    first = 2 if node.op_type in EXPERTS else 1
    given = zip(OPERATORS[node.op_type].parts, node.inputs[first:], strict=False)
    return {part: value for part, value in given if value is not None}


def replace_product(
    graph: ir.Graph, node: ir.Node, packed: Packed, exact: bool, values: Mapping[str, ir.Value]
) -> None:
    """Put our operator in the place of a Gemm.

    Args:
        values: what holds the weight, by part. exact: of few bits: inputs are not rounded.
    """
    form = form_of(packed)
    x, _, *bias = node.inputs
    # The last input is named where there is none, too: not every reader of functions fills it up.
    inputs = [x, *(values[part] for part in form.parts), bias[0] if bias else None]
    made = ir.node(f"Linear{form.suffix}", inputs, attributes=sizes_of(packed, exact), domain=DOMAIN, name=node.name)
    put(graph, node, made)


def put(graph: ir.Graph, node: ir.Node, made: ir.Node) -> None:
    """Put ``made`` in the place of ``node``, each of one output."""
    out, old = made.outputs[0], node.outputs[0]
    out.name, out.dtype, out.shape = old.name, old.dtype, old.shape
    graph.insert_before(node, [made])
    old.replace_all_uses_with(out, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def sizes_of(packed: Packed, exact: bool, experts: int | None = None) -> dict[str, int]:
    rows, columns = packed.shape
    sizes = {"in_features": columns, "out_features": rows // (experts or 1)}
    if experts is not None:
        sizes["experts"] = experts
    if packed.bits is not None:
        sizes |= {"group": min(packed.group or columns, columns), "exact": int(exact)}
    return sizes


def add_functions(model: ir.Model) -> None:
    """Write what our operators compute beside the graph that uses them."""
    for operator in sorted({node.op_type for node in model.graph if node.domain == DOMAIN}):
        for proto in functions_of(operator, model.opset_imports[""]):
            function = ir.serde.deserialize_function(proto)
            model.functions[function.identifier()] = function
        model.opset_imports[DOMAIN] = 1


def unpacked_values(graph: ir.Graph, weights: Mapping[str, tuple[Form, torch.Size, int | None]]) -> dict[str, ir.Value]:
    """Packed weights as values of ``graph``, by the functions in its file.

    Args:
        weights: how each lies, its shape, and what columns share a scale (None: all).
    """
    compute = {node.inputs[0].dtype for node in graph if node.domain == DOMAIN and node.inputs[0] is not None}
    kind = next(iter(compute - {None}), None) if len(compute) == 1 else None
    made: dict[str, ir.Value] = {}
    for name, (form, shape, group) in weights.items():
        held = [graph.initializers[f"{name}.{part}"] for part in form.parts]
        like = ir.Value(name=f"{name}/like", const_value=ir.tensor([0.0], dtype=kind or ir.DataType.FLOAT))
        whole = ir.Value(name=f"{name}/shape", const_value=ir.tensor(list(shape)))
        for value in (like, whole):
            graph.register_initializer(value)
        sizes = {"in_features": shape[-1]} | ({} if form.bits is None else {"group": group or shape[-1]})
        unpack = ir.node(f"Unpack{form.suffix}", [*held, like], attributes=sizes, domain=DOMAIN)
        turn = ir.node("Reshape", [unpack.outputs[0], whole])
        graph.extend([unpack, turn])
        made[name] = turn.outputs[0]
        made[name].name, made[name].dtype, made[name].shape = f"{name}/unpacked", like.dtype, ir.Shape(list(shape))
    return made


def _way(node: ir.Node, value: ir.Value) -> bool | None:
    """Whether ``node`` is a Gemm that reads its weight turned; None where it is anything else."""
    inputs, attributes = node.inputs, node.attributes
    if node.op_type != "Gemm" or node.domain not in ("", "ai.onnx") or [v for v in inputs if v is value] != [inputs[1]]:
        return None
    plain = all(attributes[name].as_float() == 1 for name in ("alpha", "beta") if name in attributes)
    if not plain or ("transA" in attributes and attributes["transA"].as_int() == 1):
        return None
    turned = is_turned(node)
    rows = value.shape[0 if turned else 1] if value.shape is not None and len(value.shape) == 2 else None
    bias = inputs[2] if len(inputs) > 2 else None
    fits = bias is None or (bias.shape is not None and list(bias.shape) == [rows])
    return turned if rows is not None and fits else None
