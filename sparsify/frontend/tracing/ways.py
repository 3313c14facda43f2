"""What a trace left in its graph where it went the way on which something does not hold, taken out of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, fx

from sparsify.frontend.tracing.known import WAY
from sparsify.ir.graph import set_tensor
from sparsify.ir.program import Way

_ASSERT = torch.ops.aten._assert_async.msg


def without_ways(graph: fx.Graph, read: Callable[[str], Tensor]) -> tuple[Way, ...]:
    """Take the marks of :class:`sparsify.frontend.tracing.known.Known` out of ``graph``; what each asks by itself.

    Args:
        read: the value of a ``get_attr`` of the graph.
    """
    marks = [n for n in graph.nodes if n.target is _ASSERT and str(n.args[1]).startswith(WAY)]
    ways = {mark.args: Way(str(mark.args[1]).removeprefix(WAY), _alone(graph, mark, read)) for mark in marks}
    for mark in marks:
        graph.erase_node(mark)
    return tuple({(way.where, way.asked.code): way for way in ways.values()}.values())


def _alone(graph: fx.Graph, mark: fx.Node, read: Callable[[str], Tensor]) -> fx.GraphModule:
    (asked,) = mark.all_input_nodes
    needed = _needed(graph, asked, mark)
    alone, root, env = fx.Graph(), torch.nn.Module(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        if node not in needed:
            continue
        if node.op == "get_attr":
            name = str(node.target).replace(".", "_")
            set_tensor(root, name, read(str(node.target)).detach().cpu())
            env[node] = alone.get_attr(name)
            continue
        env[node] = alone.node_copy(node, lambda n: env[n])
    alone.output(env[asked])
    return fx.GraphModule(root, alone)


def _needed(graph: fx.Graph, asked: fx.Node, mark: fx.Node) -> set[fx.Node]:
    """What is computed for ``asked``, and what is written to any of it before that is asked."""
    needed, todo = set[fx.Node](), [asked]
    before = list(itertools.takewhile(lambda node: node is not mark, graph.nodes))
    writing = [n for n in before if getattr(getattr(n.target, "_schema", None), "is_mutable", False)]
    while todo:
        while todo:
            if (node := todo.pop()) not in needed:
                needed.add(node)
                todo += node.all_input_nodes
        todo = [node for node in writing if node not in needed and needed.intersection(_chain(node))]
    return needed


def _chain(node: fx.Node) -> list[fx.Node]:
    """What a node writes to, and what that is a view of."""
    chain = []
    while node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        chain.append(node)
    return chain
