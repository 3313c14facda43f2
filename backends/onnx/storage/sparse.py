"""Products with packed weights as operators of the domain ``sparsify``, which our library gives to onnxruntime.

Each operator is a function of standard ones in the file too: whoever has no library computes the same with dense
weights.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx_ir as ir

from sparsify.backends.onnx.storage.bodies import DOMAIN, EXPERTS, LINEAR, OPERATORS, Form, functions_of
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
    made = ir.node(f"Linear{form.suffix}", inputs, attributes=_sizes(packed, exact), domain=DOMAIN, name=node.name)
    put(graph, node, made)


def put(graph: ir.Graph, node: ir.Node, made: ir.Node) -> None:
    """Put ``made`` in the place of ``node``, each of one output."""
    out, old = made.outputs[0], node.outputs[0]
    out.name, out.dtype, out.shape = old.name, old.dtype, old.shape
    graph.insert_before(node, [made])
    old.replace_all_uses_with(out, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _sizes(packed: Packed, exact: bool, experts: int | None = None) -> dict[str, int]:
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


def unpacked_values(graph: ir.Graph, names: Collection[str]) -> dict[str, ir.Value]:
    """The packed weights ``names`` as values of ``graph``, by the functions in its file."""
    made: dict[str, ir.Value] = {}
    for node in [n for n in graph if n.domain == DOMAIN and n.op_type in LINEAR]:
        parts = parts_of(node)
        name = str(parts["values"].name).removesuffix(".values") if "values" in parts else ""
        if name not in names or name in made:
            continue
        like = ir.Value(name=f"{name}/like", const_value=ir.tensor([0.0], dtype=_compute(node)))
        graph.register_initializer(like)
        sizes = {key: node.attributes[key].as_int() for key in ("in_features", "group") if key in node.attributes}
        inputs = [*parts.values(), like]
        unpack = ir.node(f"Unpack{LINEAR[node.op_type].suffix}", inputs, attributes=sizes, domain=DOMAIN)
        graph.append(unpack)
        made[name] = unpack.outputs[0]
        made[name].name, made[name].dtype = f"{name}/unpacked", like.dtype
        made[name].shape = ir.Shape([node.attributes[n].as_int() for n in ("out_features", "in_features")])
    return made


def _compute(node: ir.Node) -> ir.DataType:
    """The type that a product computes in, where the file says it."""
    x = node.inputs[0]
    if x is not None and x.dtype is not None:
        return x.dtype
    parts = parts_of(node)
    held = parts.get("scales", parts["values"]).dtype
    return held or ir.DataType.FLOAT


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
