"""What each operator does to the rows of its operands: a table by the operator's name.

A rule takes the walk and a node and returns the rows of its value, a list of such lists for several values. A function
that several operators share is a family: element by element, a view, a reduction, a product.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from sparsify.analysis.dimensions.rules import products, recurrences, values, views
from sparsify.analysis.dimensions.walk import RowRule, Walk
from sparsify.ir.operators import GROUPED_PRODUCTS

_ELEMENTWISE = (
    "add", "sub", "mul", "div", "pow", "neg", "abs", "rsqrt", "sqrt", "exp", "log", "log2", "cos", "sin", "tanh",
    "sigmoid", "silu", "gelu", "relu", "softplus", "erf", "elu", "mish", "leaky_relu", "hardswish", "hardsigmoid",
    "hardtanh", "where", "clamp", "clamp_min", "clamp_max", "minimum", "maximum", "masked_fill", "floor_divide",
    "remainder", "eq", "ne", "lt", "le", "gt", "ge", "__and__", "__or__", "bitwise_and", "bitwise_or", "bitwise_not",
    "logical_and", "logical_or", "logical_not", "isinf", "isnan", "copy", "rsub", "reciprocal", "square", "sign",
    "round", "floor", "ceil", "log1p", "expm1", "addcmul", "addcdiv", "lerp",
)  # fmt: skip
_PASSES = (
    "to", "_to_copy", "contiguous", "clone", "detach", "alias", "type_as", "dropout", "zeros_like",
    "ones_like", "full_like", "empty_like",
)  # fmt: skip


def _least_or_most(walk: Walk, node: fx.Node) -> Any:
    """``min`` and ``max``: of two operands element by element, of one over a dimension."""
    return (values.elementwise if len(node.all_input_nodes) > 1 else values.extreme)(walk, node)


_FILLED = ("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_empty", "new_full")
_FAMILIES: tuple[tuple[RowRule, tuple[str, ...]], ...] = (
    (values.elementwise, _ELEMENTWISE),
    (values.passes, _PASSES),
    (values.running, ("cumsum",)),
    (values.filled, _FILLED),
    (values.constant, ("arange", "diff", "eye")),
    (values.mean, ("mean", "var")),
    (values.extreme, ("amax", "amin", "any", "all")),
    (values.softmax, ("softmax", "_softmax")),
    (values.normalized, ("layer_norm", "rms_norm")),
    (values.padded, ("pad", "constant_pad_nd")),
    (values.triangle, ("tril", "triu")),
    (_least_or_most, ("min", "max")),
    (views.view, ("view", "reshape", "_unsafe_view", "flatten", "unflatten")),
    (views.pieces, ("chunk", "split", "split_with_sizes", "unbind")),
    (views.reverse, ("t", "numpy_T")),
    (products.matmul, ("mm", "bmm", "matmul")),
    (products.convolution, ("conv1d", "conv2d", "conv3d")),
    (recurrences.delta_rule, ("torch_chunk_gated_delta_rule", "chunk_kimi_delta_attention")),
    (products.grouped, tuple(sorted(GROUPED_PRODUCTS))),
)
RULES: dict[str, RowRule] = {name: rule for rule, names in _FAMILIES for name in names} | {
    "sum": values.total,
    "topk": values.topk,
    "sort": values.ordered,
    "histc": values.counted,
    "embedding": values.embedding,
    "index": values.indexed,
    "index_put": values.put,
    "gather": values.gathered,
    "scatter": values.scattered,
    "transpose": views.transpose,
    "permute": views.permute,
    "unsqueeze": views.unsqueeze,
    "squeeze": views.squeeze,
    "expand": views.expand,
    "repeat": views.repeat,
    "repeat_interleave": views.repeat_interleave,
    "slice": views.cut,
    "select": views.select,
    "getitem": views.item,
    "cat": views.joined,
    "stack": views.stacked,
    "linear": products.linear,
    "addmm": products.addmm,
    "baddbmm": products.baddbmm,
    "einsum": products.einsum,
    "scaled_dot_product_attention": products.attention,
    "mamba_selective_scan": recurrences.selective_scan,
    "rwkv_linear_attention": recurrences.decayed_attention,
}
