"""Products of tokens with an expert each as our operators: a stack of matrices, and for each token which of them.

A stack that the checkpoint holds as many tensors is packed as many, under their names; the graph joins them, which
onnxruntime does once, when it opens the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from sparsify.backends.onnx.products.bodies import DOMAIN, OPERATORS
from sparsify.backends.onnx.products.sparse import form_of, parts_of, put, sizes_of
from sparsify.backends.onnx.storage.builder import Builder
from sparsify.ir.weights import Conversion
from sparsify.runtime.layout import PADDING, Packed


def reading_experts(value: ir.Value) -> list[tuple[ir.Node, ir.Node]]:
    """The nodes that pick matrices of the stack ``value``, and those that multiply them with a token each; none where
    anything else reads it, or not all see it as [experts, out_features, in_features] or as [experts, in_features,
    out_features].
    """
    found = []
    for use in value.uses():
        pick = use.node
        readers = [reader.node for output in pick.outputs for reader in output.uses()]
        if not _picks(pick, value) or len(readers) != 1 or not _multiplies(readers[0], pick.outputs[0]):
            return []
        found.append((pick, readers[0]))
    return found if len({_beside(multiply, pick.outputs[0]) for pick, multiply in found}) == 1 else []


def is_in_first(pair: tuple[ir.Node, ir.Node]) -> bool:
    """Whether the stack of nodes that :func:`reading_experts` found lies [experts, in_features, out_features]."""
    pick, multiply = pair
    return _beside(multiply, pick.outputs[0]) == 0


def order_of(conversion: Conversion, stack: Tensor, sources: Mapping[str, Tensor]) -> list[str] | None:
    """The tensors ``sources`` in the order in which their rows make ``stack``; None where they do not just so."""
    by_pattern: dict[str, list[str]] = {}
    for key, pattern in conversion.sources:
        by_pattern.setdefault(pattern, []).append(key)
    patterns = [by_pattern[p] for p in conversion.converter.source_patterns if p in by_pattern]
    if {len(keys) for keys in patterns} != {stack.shape[0]} or any(t.dim() != 2 for t in sources.values()):
        return None
    order = [key for of_expert in zip(*patterns, strict=True) for key in of_expert]
    rows = torch.cat([sources[key] for key in order])
    return order if torch.equal(rows, stack.flatten(0, 1)) else None


def join(build: Builder, name: str, packed: Packed, held: Sequence[Mapping[str, ir.Value]]) -> dict[str, ir.Value]:
    """One weight of several that lie below each other; ``held``: the values of each by part."""
    if len(held) == 1:
        return dict(held[0])
    joined = {}
    for part in form_of(packed).parts:
        values = [own[part] for own in held]
        if part == "values" and packed.layout == "bitmask":
            # Each ends with zeros of its own: those of the last are the joined one's.
            values = [*(_without_padding(build, value) for value in values[:-1]), values[-1]]
        rows = sum(int(value.shape[0]) for value in values if value.shape is not None)
        assert values[0].shape is not None and values[0].dtype is not None
        shape = [rows, *values[0].shape.dims[1:]]
        joined[part] = build.node("Concat", values, f"{name}/{part}", shape, values[0].dtype, axis=0)
    return joined


def replace_experts(
    graph: ir.Graph,
    build: Builder,
    pair: tuple[ir.Node, ir.Node],
    packed: Packed,
    exact: bool,
    values: Mapping[str, ir.Value],
    experts: int,
) -> None:
    """Put our operator in the place of the two nodes that :func:`reading_experts` found."""
    pick, multiply = pair
    form, last = form_of(packed), build.constant("last", np.array([-1], np.int64))
    # A token is a column behind its matrix, or a row before it.
    x = multiply.inputs[_beside(multiply, pick.outputs[0])]
    one = build.constant("before_last", np.array([-2], np.int64)) if is_in_first(pair) else last
    index, tokens = ir.node("Reshape", [pick.inputs[1], last]), ir.node("Squeeze", [x, one])
    given = [values[part] for part in form.parts]
    made = ir.node(
        f"Experts{form.suffix}",
        [tokens.outputs[0], index.outputs[0], *given],
        attributes=sizes_of(packed, exact, experts),
        domain=DOMAIN,
        name=multiply.name,
    )
    old = multiply.outputs[0]
    assert x is not None and x.shape is not None and x.dtype is not None
    count, rows = x.shape[0], packed.shape[0] // experts
    for node, shape, kind, what in (
        (index, [count], ir.DataType.INT64, "expert"),
        (tokens, [count, packed.shape[1]], x.dtype, "tokens"),
        (made, [count, rows], x.dtype, "products"),
    ):
        out = node.outputs[0]
        out.name, out.shape, out.dtype = f"{old.name}/{what}", ir.Shape(shape), kind
    graph.insert_before(multiply, [index, tokens, made])
    put(graph, multiply, ir.node("Unsqueeze", [made.outputs[0], one]))
    graph.remove(pick, safe=True)


def names_held(node: ir.Node) -> list[str]:
    """The weights that an operator of ours multiplies with, in the order of their rows; none where what it reads does
    not belong together.
    """
    found = {tuple(_stems(value, part)) for part, value in parts_of(node).items()}
    complete = len(parts_of(node)) == len(OPERATORS[node.op_type].parts)
    return list(found.pop()) if len(found) == 1 and complete else []


def expand_experts(graph: ir.Graph, node: ir.Node, dense: Sequence[ir.Value], *, in_first: bool) -> None:
    """Put what picks matrices and multiplies in the place of an ``Experts`` operator.

    Args:
        dense: its weights in the order of their rows, in the dtype that it computes in. in_first: whether they lie
            [in_features, out_features].
    """
    asked = ("experts", *(("in_features", "out_features") if in_first else ("out_features", "in_features")))
    sizes = [node.attributes[name].as_int() for name in asked]
    shape = _constant(graph, f"{node.name}/shape", np.array(sizes, np.int64))
    one = _constant(graph, f"{node.name}/one", np.array([-2 if in_first else -1], np.int64))
    rows = ir.node("Concat", list(dense), attributes={"axis": 0})
    stack = ir.node("Reshape", [rows.outputs[0], shape])
    chosen = ir.node("Gather", [stack.outputs[0], node.inputs[1]], attributes={"axis": 0})
    tokens = ir.node("Unsqueeze", [node.inputs[0], one])
    pair = [chosen.outputs[0], tokens.outputs[0]]
    products = ir.node("MatMul", pair[::-1] if in_first else pair)
    graph.insert_before(node, [rows, stack, chosen, tokens, products])
    put(graph, node, ir.node("Squeeze", [products.outputs[0], one], name=node.name))


def _picks(node: ir.Node, value: ir.Value) -> bool:
    index = node.inputs[1] if len(node.inputs) > 1 else None
    plain = node.op_type == "GatherND" and node.inputs[0] is value and index is not value
    counted = "batch_dims" in node.attributes and node.attributes["batch_dims"].as_int() != 0
    return plain and not counted and index is not None and index.shape is not None and _ends_with(index, 1, rank=2)


def _multiplies(node: ir.Node, matrices: ir.Value) -> bool:
    if node.op_type != "MatMul" or sum(v is matrices for v in node.inputs) != 1:
        return False
    place = _beside(node, matrices)
    x = node.inputs[place]
    return x is not None and _ends_with(x, 1, rank=3, axis=-1 if place else -2)


def _beside(multiply: ir.Node, matrices: ir.Value) -> int:
    """Which input of a product is the one that ``matrices`` are not."""
    return 1 if multiply.inputs[0] is matrices else 0


def _ends_with(value: ir.Value, size: int, rank: int, axis: int = -1) -> bool:
    return value.shape is not None and len(value.shape) == rank and value.shape[axis] == size


def _without_padding(build: Builder, values: ir.Value) -> ir.Value:
    assert values.shape is not None and values.dtype is not None
    ends = [build.constant(name, np.array([n], np.int64)) for name, n in (("none", 0), ("padding", -PADDING))]
    kept = int(values.shape[0]) - PADDING
    return build.node("Slice", [values, *ends], f"{values.name}/own", [kept], values.dtype)


def _stems(value: ir.Value, part: str) -> list[str]:
    """The weights whose ``part`` a value joins."""
    node = value.producer()
    if node is None:
        stem = str(value.name).removesuffix(f".{part}")
        return [stem] if stem != value.name else []
    given = [v for v in node.inputs if v is not None]
    if node.op_type == "Concat":
        return [stem for v in given if v is not value for stem in _stems(v, part)]
    return _stems(given[0], part) if node.op_type == "Slice" and given and given[0].producer() is None else []


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value
