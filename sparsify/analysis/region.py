"""Order and lifetime: what a graph computes once, what it computes per batch, and how long each value lives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from sparsify.program import Program


@dataclass
class Flow:
    """Facts about a program's nodes that the interpreter and the analyses share.

    Attributes:
        order: the nodes; ``position``: where each stands; ``last_use``: the position of its last user.
        varying: nodes that depend on an input; all others are the same for every batch.
        parameters: for each node that depends on no input, the parameters it is computed from (often none).
        inputs: for each varying node, the names of the inputs it depends on.
    """

    order: list[fx.Node]
    position: dict[fx.Node, int]
    last_use: dict[fx.Node, int]
    varying: set[fx.Node]
    parameters: dict[fx.Node, frozenset[str]]
    inputs: dict[fx.Node, frozenset[str]]

    @classmethod
    def of(cls, program: Program) -> Flow:
        order = program.nodes
        position = {node: i for i, node in enumerate(order)}
        last_use = {node: max((position[u] for u in node.users), default=i) for i, node in enumerate(order)}
        parameters: dict[fx.Node, frozenset[str]] = {}
        inputs: dict[fx.Node, frozenset[str]] = {}
        # Most nodes repeat one of a few sets; sharing them keeps this linear in memory for deep graphs.
        shared: dict[frozenset[str], frozenset[str]] = {}
        for node in order:
            if node.op == "placeholder":
                inputs[node] = frozenset([str(node.meta.get("input", node.target))])
                continue
            names = frozenset().union(*(inputs.get(a, frozenset()) for a in node.all_input_nodes))
            if names:
                inputs[node] = shared.setdefault(names, names)
            elif name := program.parameter(node):
                parameters[node] = frozenset([program.weights.canonical(name)])
            else:
                read = frozenset().union(*(parameters.get(a, frozenset()) for a in node.all_input_nodes))
                parameters[node] = shared.setdefault(read, read)
        return cls(order, position, last_use, set(inputs), parameters, inputs)

    def live(self, cut: int, end: int) -> list[fx.Node]:
        """Varying nodes before ``cut`` that a node in [cut, end) reads: what must be kept per batch at the cut.

        Inputs are left out: they are kept for the whole run anyway.
        """
        needed = []
        for node in self.order[:cut]:
            if node not in self.varying or node.op == "placeholder" or self.last_use[node] < cut:
                continue
            if any(cut <= self.position[user] < end for user in node.users):
                needed.append(node)
        return needed
