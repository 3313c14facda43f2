"""Products with packed weights as operators of the domain ``sparsify``, which our library gives to onnxruntime.

Each operator is a function of standard ones in the file too: whoever has no library computes the same with dense
weights.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from sparsify.backends.onnx.storage.datafile import TYPES
from sparsify.errors import Refused
from sparsify.runtime.layout import Packed, choose_layout, pack

if TYPE_CHECKING:
    from sparsify.runtime.words import Layout

DOMAIN = "sparsify"
OPERATORS: dict[str, str] = {"packed24": "Linear24", "bitmask": "LinearBitmask"}
LAYOUTS: dict[str, Layout] = {"Linear24": "packed24", "LinearBitmask": "bitmask"}
# Of a bitmask: with fewer a token gains little with AVX-512 and loses with AVX2, and prompts lose (docs/benchmarks.md).
LEAST_ZEROS = 0.4
# What the library's product of float32 inputs takes; of others it takes their own.
_BESIDE_FLOAT = (torch.float32, torch.bfloat16, torch.float16)

_PRODUCT = """
<domain: "sparsify", opset_import: ["" : {opset}, "sparsify" : 1]>
{name} <in_features: int, out_features: int> (x, values, codes, bias) => (y) {{
  weight = sparsify.{unpack} <in_features: int = @in_features, out_features: int = @out_features> (values, codes, x)
  y = Gemm <transB = 1> (x, weight, bias)
}}
"""
_HEAD = """
<domain: "sparsify", opset_import: ["" : {opset}]>
{name} <in_features: int, out_features: int> (values, codes, like) => (weight) {{
  numbers = CastLike (values, like)
  first = Constant <value = int64[1] {{0}}> ()
  rest = Constant <value = int64[1] {{-1}}> ()
  second = Constant <value = int64[1] {{1}}> ()
  column = Constant <value = int64[2] {{-1, 1}}> ()
  bytes = Reshape (codes, column)
"""
_TAIL = """
  rows = Constant <value_int: int = @out_features> ()
  rows_ = Reshape (rows, rest)
  padded = Concat <axis = 0> (rows_, rest)
  all = Reshape (flat, padded)
  columns = Constant <value_int: int = @in_features> ()
  columns_ = Reshape (columns, rest)
  weight = Slice (all, first, columns_, second)
}}
"""
# Two values of every four, at the positions that two bits each name.
_PAIRS = """
  shifts = Constant <value = uint8[4] {{0, 2, 4, 6}}> ()
  three = Constant <value = uint8 {{3}}> ()
  pairs = Constant <value = int64[2] {{-1, 2}}> ()
  shifted = BitShift <direction = "RIGHT"> (bytes, shifts)
  two = BitwiseAnd (shifted, three)
  places = Reshape (two, pairs)
  at = Cast <to = 6> (places)
  kept = Reshape (numbers, pairs)
  none = Constant <value = float[1] {{0.0}}> ()
  zero = CastLike (none, like)
  groups = Shape <start = 0, end = 1> (kept)
  four = Constant <value = int64[1] {{4}}> ()
  size = Concat <axis = 0> (groups, four)
  zeros = Expand (zero, size)
  flat = ScatterElements <axis = 1> (zeros, at, kept)
"""
# A weight is the value whose number is that of the bits before its own, or the last one, which is a zero.
_BITS = """
  powers = Constant <value = uint8[8] {{1, 2, 4, 8, 16, 32, 64, 128}}> ()
  masked = BitwiseAnd (bytes, powers)
  bits = Cast <to = 9> (masked)
  line = Reshape (bits, rest)
  ones = Cast <to = 6> (line)
  axis = Constant <value = int64 {{0}}> ()
  before = CumSum <exclusive = 1> (ones, axis)
  count = Shape (values)
  last = Sub (count, second)
  last_ = Cast <to = 6> (last)
  at = Where (line, before, last_)
  flat = Gather <axis = 0> (numbers, at)
"""
UNPACKED = {"packed24": "Unpack24", "bitmask": "UnpackBitmask"}
_BODIES = {"packed24": _PAIRS, "bitmask": _BITS}


def reading_products(value: ir.Value) -> list[ir.Node]:
    """The nodes that read the weight ``value``, where each is a plain product with it, all of one layout; else none."""
    nodes = [use.node for use in value.uses()]
    ways = {_way(node, value) for node in nodes}
    return nodes if len(ways) == 1 and None not in ways else []


def is_turned(node: ir.Node) -> bool:
    """Whether a Gemm reads its weight as [out_features, in_features]."""
    return "transB" in node.attributes and node.attributes["transB"].as_int() == 1


def packed_for(weight: Tensor, compute: ir.DataType) -> Packed | Refused:
    """``weight`` [out_features, in_features] as the library multiplies with it, or why it is left dense."""
    if compute != ir.DataType.FLOAT and TYPES.get(weight.dtype) != compute:
        return Refused(f"{weight.dtype} in a graph that computes in {compute.name.lower()}")
    if weight.dtype not in _BESIDE_FLOAT:
        return Refused(f"of {weight.dtype}")
    layout = choose_layout(weight)
    if isinstance(layout, Refused):
        return layout
    zeros = 1 - int(torch.count_nonzero(weight)) / weight.numel()
    if layout == "bitmask" and zeros < LEAST_ZEROS:
        return Refused(f"{zeros:.0%} zeros, too few to be faster than dense")
    return pack(weight, layout)


def replace_product(graph: ir.Graph, node: ir.Node, packed: Packed, values: ir.Value, codes: ir.Value) -> None:
    """Put our operator in the place of a Gemm."""
    x, _, *bias = node.inputs
    rows, columns = packed.shape
    # The last input is named where there is none, too: not every reader of functions fills it up.
    made = ir.node(
        OPERATORS[packed.layout],
        [x, values, codes, bias[0] if bias else None],
        attributes={"in_features": columns, "out_features": rows},
        domain=DOMAIN,
        name=node.name,
    )
    out, old = made.outputs[0], node.outputs[0]
    out.name, out.dtype, out.shape = old.name, old.dtype, old.shape
    graph.insert_before(node, [made])
    old.replace_all_uses_with(out, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def functions_of(layout: str, opset: int) -> list[onnx.FunctionProto]:
    """What our operator of ``layout`` computes, in standard operators; and what that calls."""
    unpack = (_HEAD + _BODIES[layout] + _TAIL).format(name=UNPACKED[layout], opset=opset)
    product = _PRODUCT.format(name=OPERATORS[layout], unpack=UNPACKED[layout], opset=opset)
    return [onnx.parser.parse_function(text) for text in (unpack, product)]


def add_functions(model: ir.Model) -> None:
    """Write what our operators compute beside the graph that uses them."""
    for layout in sorted({LAYOUTS[node.op_type] for node in model.graph if node.domain == DOMAIN}):
        for proto in functions_of(layout, model.opset_imports[""]):
            function = ir.serde.deserialize_function(proto)
            model.functions[function.identifier()] = function
        model.opset_imports[DOMAIN] = 1


def unpacked_values(graph: ir.Graph, names: Collection[str]) -> dict[str, ir.Value]:
    """The packed weights ``names`` as values of ``graph``, by the functions in its file."""
    made: dict[str, ir.Value] = {}
    for node in [n for n in graph if n.domain == DOMAIN and n.op_type in LAYOUTS]:
        x, values, codes = node.inputs[:3]
        name = str(codes.name).removesuffix(".codes") if codes is not None else ""
        if name not in names or name in made:
            continue
        like = ir.Value(name=f"{name}/like", const_value=ir.tensor([0.0], dtype=_compute(x, values)))
        graph.register_initializer(like)
        unpack = ir.node(
            UNPACKED[LAYOUTS[node.op_type]], [values, codes, like], attributes=node.attributes, domain=DOMAIN
        )
        graph.append(unpack)
        made[name] = unpack.outputs[0]
        made[name].name, made[name].dtype = f"{name}/unpacked", like.dtype
        made[name].shape = ir.Shape([node.attributes[n].as_int() for n in ("out_features", "in_features")])
    return made


def _compute(x: ir.Value | None, values: ir.Value | None) -> ir.DataType:
    """The type that a product computes in: that of its inputs, or of its values where the file does not say it."""
    kind = x.dtype if x is not None and x.dtype is not None else values.dtype if values is not None else None
    return kind or ir.DataType.FLOAT


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
