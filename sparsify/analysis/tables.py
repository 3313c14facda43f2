"""Tables: parameters whose rows are looked up, such as an embedding of tokens, and multiplied with nothing."""

from __future__ import annotations

from collections.abc import Mapping

from sparsify.analysis.linear import LinearSite, block_of
from sparsify.ir.operators import argument, exact_name
from sparsify.ir.program import Program


def find_tables(program: Program) -> Mapping[str, LinearSite]:
    """Every table [rows, width] by its parameter, as if each row were an output neuron: what takes one matrix after the
    other takes it so. Its ``activation`` are the ids. Found once a graph.
    """
    return program.fact(_search)


def is_table(site: LinearSite) -> bool:
    """Whether ``site`` only looks rows up; one that an output layer shares is a site of that."""
    return exact_name(site.node) == "embedding"


def _search(program: Program) -> dict[str, LinearSite]:
    found: dict[str, LinearSite] = {}
    for node in program.graph.nodes:
        if node.op != "call_function" or exact_name(node) != "embedding":
            continue
        table, ids = argument(node, 0, "weight"), argument(node, 1, "indices")
        held = program.parameter(table)
        if held is None:
            continue
        name, shape = program.weights.canonical(held), table.meta["val"].shape
        found.setdefault(
            name,
            LinearSite(node, name, ids, -1, 0, 1, None, (shape[0], shape[1]), block=block_of(name)),
        )
    return found
