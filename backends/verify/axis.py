"""Along which axis a runtime sums the products of each weight: read from the graph, not from a name.

From every MatMul, Gemm and convolution the weight operand is followed back through whatever only moves it (transposes,
casts, gathers of experts, joins, unpacking) to the tensor that is stored.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import onnx_ir as ir

from sparsify.backends.onnx.products.bodies import DOMAIN, EXPERTS, OPERATORS
from sparsify.backends.onnx.products.stacks import names_held

_SAME = {"Cast", "Identity", "DequantizeLinear"}
_OPAQUE = {"MatMulNBits", "MatMulInteger", "QLinearMatMul", "QMoE", "MoE", "MatMulBnb4"}
# What a node raises whose attributes, inputs or shapes are not those of its operator.
_BROKEN = (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError, RecursionError)


@dataclass(frozen=True)
class SummedAxis:
    """A stored tensor and the axis of it that ``operator`` sums over (in_features); ``flat``: both operands are 2-D."""

    name: str
    axis: int
    operator: str
    flat: bool


def summed_axes(model: ir.Model, packed: Collection[str] = ()) -> tuple[list[SummedAxis], list[str]]:
    """Every contraction with a stored weight, each weight once per axis, and what could not be followed.

    Args:
        packed: names of values that are unpacked in the graph: they count as stored.
    """
    stored = set(model.graph.initializers) | set(packed)
    found: dict[tuple[str, int], SummedAxis] = {}
    lost: list[str] = []
    for node in model.graph.all_nodes():
        if node.domain == DOMAIN and node.op_type in OPERATORS:
            names = names_held(node)
            # A stack that is one tensor has its experts first.
            at = 2 if len(names) == 1 and node.op_type in EXPERTS else 1
            for name in names:
                found.setdefault((name, at), SummedAxis(name, at, node.op_type, node.op_type not in EXPERTS))
            if not names or not stored.issuperset(names):
                lost.append(f"{node.name or node.op_type}: what it reads is of no weight that is stored")
            continue
        try:
            for value, axis, flat in _operands(node):
                for name, at in _follow(value, axis, stored, set()):
                    found.setdefault((name, at), SummedAxis(name, at, node.op_type, flat))
        except _BROKEN:
            lost.append(f"{node.name or node.op_type}: it, or what leads to it, breaks the rules of its operator")
        if node.op_type in _OPAQUE:
            lost.append(f"{node.name or node.op_type} ({node.domain or 'ai.onnx'}::{node.op_type}: not float weights)")
    return list(found.values()), lost


def _operands(node: ir.Node) -> list[tuple[ir.Value, int, bool]]:
    """The operands of a contraction, each with the axis that is summed over and whether all operands are 2-D."""
    inputs = node.inputs
    if len(inputs) < 2 or inputs[0] is None or inputs[1] is None:
        return []
    left, right = inputs[0], inputs[1]
    ranks = [len(v.shape) if v.shape is not None else None for v in (left, right)]
    flat = ranks == [2, 2]
    if node.op_type == "Gemm":
        return [(left, 0 if _flag(node, "transA") else 1, True), (right, 1 if _flag(node, "transB") else 0, True)]
    if node.op_type in ("MatMul", "FusedMatMul"):
        out = []
        if ranks[0] is not None and ranks[0] > 1:
            out.append((left, ranks[0] - (2 if _flag(node, "transA") else 1), flat))
        if ranks[1] is not None and ranks[1] > 1:
            out.append((right, ranks[1] - (1 if _flag(node, "transB") else 2), flat))
        return out
    if node.op_type == "Conv" and right.shape is not None and all(n == 1 for n in right.shape[2:]):
        return [(right, 1, False)]
    return []


def _flag(node: ir.Node, name: str) -> bool:
    return name in node.attributes and node.attributes[name].as_int() == 1


def _follow(value: ir.Value | None, axis: int, stored: set[str], seen: set[ir.Value]) -> list[tuple[str, int]]:
    """Stored tensors that ``value`` is made of, with the axis of each that its ``axis`` is.

    Args:
        seen: values on the way so far: a damaged graph may run in a circle.
    """
    while value is not None:
        if value in seen:
            return []
        seen.add(value)
        if value.name in stored:
            return [(str(value.name), axis)]
        node = value.producer()
        if node is None:
            return []
        kind = node.op_type
        if kind == "Transpose":
            axis = list(node.attributes["perm"].as_ints())[axis]
        elif kind == "Concat":
            parts = [_follow(v, axis, stored, seen) for v in node.inputs]
            return [pair for part in parts for pair in part]
        elif kind == "Gather":
            index = node.inputs[1]
            if index is None or index.shape is None:
                return []
            at, rank = node.attributes["axis"].as_int() if "axis" in node.attributes else 0, len(index.shape)
            if at <= axis < at + rank:
                return []
            axis = axis if axis < at else axis - rank + 1
        elif kind == "GatherND":
            index = node.inputs[1]
            if index is None or index.shape is None or not isinstance(index.shape[-1], int):
                return []
            # The index picks a point in the leading axes; those that it does not name follow its own.
            lead = len(index.shape) - 1
            if axis < lead:
                return []
            axis = axis - lead + index.shape[-1]
        elif kind == "Unsqueeze":
            added = _integers(node.inputs[1])
            if added is None or value.shape is None:
                return []
            added = [a % len(value.shape) for a in added]
            if axis in added:
                return []
            axis -= sum(a < axis for a in added)
        elif kind not in _SAME:
            return []
        value = node.inputs[0]
    return []


def _integers(value: ir.Value | None) -> list[int] | None:
    if value is None or value.const_value is None:
        return None
    return [int(n) for n in value.const_value.numpy().reshape(-1)]
