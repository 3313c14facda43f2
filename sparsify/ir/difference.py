"""Whether two programs compute the same: compared operator by operator, without a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from sparsify.ir.operators import operator_name
from sparsify.ir.program import Program


def difference(one: Program, other: Program) -> str | None:
    """Where two programs differ, operator by operator: in name, shape, numbers or constants; None where nowhere."""
    if len(one.nodes) != len(other.nodes):
        return f"{len(one.nodes)} nodes and {len(other.nodes)}"
    for a, b in zip(one.nodes, other.nodes, strict=True):
        shapes = [[_sizes(v) for v in _flat(n.meta.get("val"))] for n in (a, b)]
        names = [operator_name(n) if n.op == "call_function" else n.op for n in (a, b)]
        # Parts of one size and parts whose sizes are told are the same parts.
        alike = names[0] == names[1] or set(names) <= {"chunk", "split", "split_with_sizes"}
        if not alike or shapes[0] != shapes[1]:
            return f"{names[0]} of {shapes[0]} in place of {names[1]} of {shapes[1]}{_after(one, a)}"
        if _numbers(a) != _numbers(b):
            return f"{names[0]} by {_numbers(a)} in place of {_numbers(b)}{_after(one, a)}"
        if a.op == "get_attr" and str(b.target) in other.constants:
            held = one.constants.get(str(a.target))
            if held is None or not torch.equal(held, other.constants[str(b.target)]):
                return f"the constant {b.target}"
    return None


def _after(program: Program, node: fx.Node) -> str:
    """The parameter that was last read on the way to ``node``, in words."""
    todo, seen = [node], {node}
    while todo:
        for operand in todo.pop(0).all_input_nodes:
            if (name := program.parameter(operand)) is not None:
                return f", after {name}"
            if operand not in seen:
                seen.add(operand)
                todo.append(operand)
    return ""


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in _flat(v)] if isinstance(value, (tuple, list)) else []


def _sizes(value: Tensor) -> list[int | None]:
    """Its shape, without what only a run tells."""
    return [size if isinstance(size, int) else None for size in value.shape]


def _numbers(node: fx.Node) -> list[float]:
    """Factors among the arguments of a node; sizes show in shapes."""
    found: list[float] = []
    fx.node.map_aggregate((node.args, node.kwargs), lambda v: found.append(v) if isinstance(v, float) else None)
    return found
