"""Order and lifetime: what a graph computes once, what it computes per batch, and how long each value lives."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from sparsify.ir.program import Program


@dataclass(frozen=True)
class Flow:
    """Facts about a program's nodes that the interpreter and the analyses share.

    Attributes:
        order: the nodes; ``position``: where each stands; ``uses``: the positions of its users, and those
            until which an analysis holds it.
        varying: nodes whose value may differ between batches; all others are computed once.
        parameters: for each node that does not vary, the parameters it is computed from (often none).
        inputs: for each varying node, the names of the inputs it depends on.
        mutations: (position, root) of every operator that writes in place to a varying value; the root is
            the node that made the memory.
    """

    order: Sequence[fx.Node]
    position: Mapping[fx.Node, int]
    uses: Mapping[fx.Node, Sequence[int]]
    varying: frozenset[fx.Node]
    parameters: Mapping[fx.Node, frozenset[str]]
    inputs: Mapping[fx.Node, frozenset[str]]
    mutations: Sequence[tuple[int, fx.Node]]

    @classmethod
    def of(cls, program: Program) -> Flow:
        """The facts of ``program``'s graph, found once and shared."""
        return program.fact(cls._found)

    @classmethod
    def _found(cls, program: Program) -> Flow:
        order = program.nodes
        position = {node: i for i, node in enumerate(order)}
        uses = {node: [position[user] for user in node.users] for node in order}
        forced: set[fx.Node] = set()
        while True:
            inputs, parameters = _dependence(program, order, forced)
            mutations = [
                (position[node], root)
                for node in order
                if node in inputs
                for root in (root_of(a) for a in _written(node))
            ]
            # Memory that a batch writes to must be made anew for each batch, though it reads no input.
            late = {root for _, root in mutations if root not in inputs}
            if not late:
                return cls(order, position, uses, frozenset(inputs), parameters, inputs, mutations)
            forced |= late

    def live(self, cut: int, end: int) -> list[fx.Node]:
        """Varying nodes before ``cut`` that a node in [cut, end) reads: what must be kept per batch at the cut.

        Inputs are left out: they are kept for the whole run anyway.
        """
        return [
            node
            for node in self.order[:cut]
            if node in self.varying and node.op != "placeholder" and self.read_within(node, cut, end)
        ]

    def read_within(self, node: fx.Node, start: int, stop: int) -> bool:
        """Whether the value of ``node`` is used at a position in [start, stop)."""
        return any(start <= position < stop for position in self.uses[node])

    def holding(self, until: Mapping[fx.Node, Sequence[int]]) -> Flow:
        """The same, values kept alive up to and including these positions, though no node may read them there."""
        held = {node: (*self.uses[node], *positions) for node, positions in until.items()}
        return replace(self, uses={**self.uses, **held})

    def needs(self, cut: int, end: int, wanted: Collection[fx.Node]) -> set[fx.Node]:
        """Varying nodes in [cut, end) that ``wanted`` nodes are computed from, themselves included."""
        found: set[fx.Node] = set()
        for node in reversed(self.order[cut:end]):
            if node in self.varying and (node in wanted or any(user in found for user in node.users) or _written(node)):
                found.add(node)
        return found


def root_of(node: fx.Node) -> fx.Node:
    """The node that made the memory ``node`` may be a view of."""
    while schema := getattr(node.target, "_schema", None):
        first = schema.arguments[0] if schema.arguments else None
        if first is None or first.alias_info is None or not isinstance(node.args[0], fx.Node):
            break
        node = node.args[0]
    return node


def _written(node: fx.Node) -> list[fx.Node]:
    """Arguments that ``node`` writes to in place."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    return [
        value
        for value, argument in zip(node.args, schema.arguments, strict=False)
        if isinstance(value, fx.Node) and argument.alias_info is not None and argument.alias_info.is_write
    ]


def _dependence(
    program: Program, order: list[fx.Node], forced: set[fx.Node]
) -> tuple[dict[fx.Node, frozenset[str]], dict[fx.Node, frozenset[str]]]:
    inputs: dict[fx.Node, frozenset[str]] = {}
    parameters: dict[fx.Node, frozenset[str]] = {}
    # Most nodes repeat one of a few sets; sharing them keeps deep graphs small.
    shared: dict[frozenset[str], frozenset[str]] = {}
    for node in order:
        if node.op == "placeholder":
            inputs[node] = frozenset([str(node.meta.get("input", node.target))])
            continue
        varying = [inputs[a] for a in node.all_input_nodes if a in inputs]
        if varying or node in forced or node.op == "output":
            names = frozenset().union(*varying)
            inputs[node] = shared.setdefault(names, names)
        elif name := program.parameter(node):
            parameters[node] = frozenset([program.weights.canonical(name)])
        else:
            read = frozenset().union(*(parameters[a] for a in node.all_input_nodes))
            parameters[node] = shared.setdefault(read, read)
    return inputs, parameters
