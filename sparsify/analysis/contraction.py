"""Contractions with a constant weight in any FX graph: as torch functions, methods, modules or ATen operators.

Where :mod:`sparsify.analysis.linear` reads a captured :class:`Program`, this reads graphs of other compilers as they
are,
dynamic shapes and all: what ``torch.fx.symbolic_trace``, ``torch.compile`` and ``torch.export`` give.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify.ir.operators import GROUPED_PRODUCTS, argument, exact_name

# By name, whatever the spelling: a function of torch, a method of Tensor, an ATen operator.
VIEWS = {"t", "numpy_T", "transpose", "permute", "contiguous", "detach", "alias", "select", "getitem", "getattr",
          "unsqueeze", "squeeze", "clone"}  # fmt: skip
_ATTRIBUTES = {"T", "mT", "data"}
_LINEAR = {"linear"}
_PRODUCTS = {"matmul", "mm", "addmm"}
_OTHERS = {"bmm", "baddbmm", "conv1d", "conv2d", "conv3d", "convolution", "einsum", "tensordot", "bilinear", "mv"}


@dataclass(frozen=True)
class Contraction:
    """``node`` computes ``x`` times ``weight``ᵀ, over the last axis of ``x``.

    Attributes:
        name: what the weight is called in the graph.
        weight: [out_features, in_features], or [experts, out_features, in_features] with ``offsets``; a view of the
            graph's own tensor.
        bias: the node whose value is added, or the tensor where a module holds it.
        added: whether the bias may have any shape that broadcasts (``addmm``), not only [out_features].
        offsets: for a stack of experts, the node that holds where each expert's tokens end.
    """

    node: fx.Node
    name: str
    x: fx.Node
    weight: Tensor
    bias: fx.Node | Tensor | None = None
    added: bool = False
    offsets: fx.Node | None = None


@dataclass(frozen=True)
class NotUnderstood:
    """A node that multiplies with a constant weight in a way that is not lowered, and why."""

    node: fx.Node
    name: str
    weight: Tensor
    reason: str


def find_contractions(
    graph_module: fx.GraphModule, given: Mapping[fx.Node, Tensor]
) -> tuple[list[Contraction], list[NotUnderstood]]:
    """All contractions with a constant weight, in graph order: those understood, and those not.

    Args:
        given: placeholders whose value is known and constant (parameters that ``torch.compile`` lifted).
    """
    known = {node: (_name(node), value) for node, value in given.items()}
    found: list[Contraction] = []
    lost: list[NotUnderstood] = []
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            value = _attribute(graph_module, str(node.target))
            if isinstance(value, Tensor):
                known[node] = (str(node.target), value)
        elif node.op == "call_module":
            module = graph_module.get_submodule(str(node.target))
            # A subclass may compute otherwise; hooks are code of the user's.
            if type(module) is nn.Linear and not module._forward_hooks and not module._forward_pre_hooks:
                found.append(
                    Contraction(
                        node, f"{node.target}.weight", _first(node), module.weight.detach(), _detached(module.bias)
                    )
                )
        elif node.op in ("call_function", "call_method"):
            view = _view(node, known)
            if view is not None:
                known[node] = view
                continue
            result = _contraction(node, known)
            if isinstance(result, Contraction):
                found.append(result)
            elif result is not None:
                lost.append(result)
    return found, lost


def _contraction(node: fx.Node, known: Mapping[fx.Node, tuple[str, Tensor]]) -> Contraction | NotUnderstood | None:
    kind = exact_name(node)
    if kind not in _LINEAR | _PRODUCTS | GROUPED_PRODUCTS | _OTHERS:
        return None
    # A bias is no weight, and a product of constants no contraction of an activation.
    operands = node.args[1:3] if kind in ("addmm", "baddbmm") else node.args[:2]
    held = [a for a in operands if isinstance(a, fx.Node) and a in known]
    if not held or len(held) == len(operands):
        return None
    name, weight = known[held[0]]

    def lost(reason: str) -> NotUnderstood:
        return NotUnderstood(node, name, weight, reason)

    if kind in _OTHERS:
        return lost(f"the operator {kind} has no packed form")
    x, w = operands
    if w is not held[0] or not isinstance(x, fx.Node):
        return lost("the weight stands on the left of the activation")
    if kind in _LINEAR and weight.dim() == 2:
        bias = argument(node, 2, "bias")
        return Contraction(node, name, x, weight, bias if isinstance(bias, fx.Node) else None)
    if kind in _PRODUCTS and weight.dim() == 2:
        if kind == "addmm":
            if any(node.kwargs.get(key, 1) != 1 for key in ("alpha", "beta")):
                return lost("addmm with factors")
            addend = node.args[0]
            return Contraction(node, name, x, weight.t(), addend, added=True) if isinstance(addend, fx.Node) else None
        return Contraction(node, name, x, weight.t())
    if kind in GROUPED_PRODUCTS and weight.dim() == 3:
        offsets = argument(node, 2, "offs")
        if isinstance(offsets, fx.Node):
            return Contraction(node, name, x, weight.transpose(1, 2), offsets=offsets)
    return lost(f"{kind} with a weight of {weight.dim()} dimensions")


def _view(node: fx.Node, known: Mapping[fx.Node, tuple[str, Tensor]]) -> tuple[str, Tensor] | None:
    """The value of a node that only looks at a constant in another way; computed on the constant itself."""
    if exact_name(node) not in VIEWS or not node.args or node.args[0] not in known:
        return None
    if any(isinstance(a, fx.Node) and a not in known for a in node.all_input_nodes):
        return None
    name, value = known[node.args[0]]  # type: ignore[index]
    rest = node.args[1:]
    if any(isinstance(a, fx.Node) for a in rest):
        return None
    if node.target is getattr:
        return (name, getattr(value, str(rest[0]))) if rest and rest[0] in _ATTRIBUTES else None
    if node.target is operator.getitem or exact_name(node) == "select":
        name = f"{name}[{rest[-1]}]"
    with torch.no_grad():
        result: Any
        if node.op == "call_method":
            result = getattr(value, str(node.target))(*rest, **node.kwargs)
        else:
            result = node.target(value, *rest, **node.kwargs)  # type: ignore[operator]
    return (name, result) if isinstance(result, Tensor) else None


def _attribute(root: nn.Module, target: str) -> Any:
    value: Any = root
    for part in target.split("."):
        value = getattr(value, part, None)
    return value.detach() if isinstance(value, Tensor) else value


def _first(node: fx.Node) -> fx.Node:
    value = node.args[0] if node.args else next(iter(node.kwargs.values()))
    assert isinstance(value, fx.Node), "a linear layer is called with an activation"
    return value


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _name(node: fx.Node) -> str:
    return str(node.target)
