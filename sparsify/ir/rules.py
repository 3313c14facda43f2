"""What is true of every program, as a table: a sentence and a check for each rule.

Checked after capture and after every pass. A rule looks at the whole graph and names the places where it is broken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from sparsify.ir.weights import Weights


class Checked(Protocol):
    """The parts of a :class:`sparsify.ir.program.Program` that rules look at."""

    @property
    def graph_module(self) -> fx.GraphModule: ...

    @property
    def weights(self) -> Weights: ...

    @property
    def constants(self) -> Mapping[str, Tensor]: ...

    @property
    def output_names(self) -> list[str]: ...


Check = Callable[[Checked], Iterator[str]]


@dataclass(frozen=True)
class Rule:
    """``check`` yields the places where ``sentence`` does not hold."""

    sentence: str
    check: Check


def broken_rules(program: Checked) -> Iterator[tuple[Rule, str]]:
    """Every rule that does not hold, with the places; later rules may rely on earlier ones."""
    for rule in RULES:
        for where in rule.check(program):
            yield rule, where


def _lints(program: Checked) -> Iterator[str]:
    try:
        program.graph_module.graph.lint()
    except (RuntimeError, ValueError) as error:
        yield str(error).partition("\n")[0]


def _flat(program: Checked) -> Iterator[str]:
    for node in program.graph_module.graph.nodes:
        inner = isinstance(node.target, torch._ops.HigherOrderOperator)
        if node.op not in ("placeholder", "get_attr", "call_function", "output") or inner:
            yield f"{node.name} ({node.op} {node.target})"


def _ends_with_one_output(program: Checked) -> Iterator[str]:
    outputs = [node.name for node in program.graph_module.graph.nodes if node.op == "output"]
    if len(outputs) != 1:
        yield f"{len(outputs)} outputs"


def _inputs_are_named(program: Checked) -> Iterator[str]:
    seen: set[str] = set()
    for node in program.graph_module.graph.nodes:
        if node.op == "placeholder":
            name = node.meta.get("input")
            if not isinstance(name, str) or name in seen:
                yield f"{node.name} ({name!r})"
            seen.add(str(name))


def _outputs_are_named(program: Checked) -> Iterator[str]:
    output = next(node for node in program.graph_module.graph.nodes if node.op == "output")
    leaves: list[Any] = []
    fx.node.map_aggregate(output.args[0], leaves.append)
    if program.output_names and len(leaves) != len(program.output_names):
        yield f"{len(leaves)} outputs, {len(program.output_names)} names"


def _values_are_described(program: Checked) -> Iterator[str]:
    for node in program.graph_module.graph.nodes:
        if node.op != "output" and "val" not in node.meta:
            yield node.name


def _values_take_no_memory(program: Checked) -> Iterator[str]:
    for node in program.graph_module.graph.nodes:
        held: list[Any] = []
        fx.node.map_aggregate(node.meta.get("val"), held.append)
        if any(isinstance(value, Tensor) and not value.is_meta for value in held):
            yield node.name


def _for_no_device(program: Checked) -> Iterator[str]:
    for node in program.graph_module.graph.nodes:
        named: list[Any] = []
        fx.node.map_aggregate((node.args, node.kwargs), named.append)
        if any(isinstance(value, torch.device) and value.type != "cpu" for value in named):
            yield node.name


def _tensors_are_held(program: Checked) -> Iterator[str]:
    for node in program.graph_module.graph.nodes:
        if node.op == "get_attr" and node.target not in program.constants and node.target not in program.weights:
            yield f"{node.name} (no tensor {node.target})"


def _constants_have_numbers(program: Checked) -> Iterator[str]:
    for name, value in program.constants.items():
        if value.is_meta:
            yield name


def _shapes_agree(program: Checked) -> Iterator[str]:
    for node in program.graph_module.graph.nodes:
        if node.op != "get_attr":
            continue
        target, said = str(node.target), tuple(node.meta["val"].shape)
        constant = program.constants.get(target)
        held = tuple(program.weights.shape(target) if constant is None else constant.shape)
        if held != said:
            yield f"{node.name} ({list(said)} in the graph, {list(held)} held)"


def _ties_lead_somewhere(program: Checked) -> Iterator[str]:
    own = set(program.weights.parameters())
    for alias, name in program.weights.aliases.items():
        # A tie of parameters that no checkpoint holds is none of the program's.
        if alias in own or (name in program.weights.aliases):
            yield f"{alias} (tied to {name})"


RULES: tuple[Rule, ...] = (
    Rule("nodes stand after what they read, and the graph lints", _lints),
    Rule("the graph is flat: inputs, tensors, functions and one output, nothing nested", _flat),
    Rule("the graph has one output", _ends_with_one_output),
    Rule("every input carries the name by which batches give it, once", _inputs_are_named),
    Rule("there is a name for every output", _outputs_are_named),
    Rule("every value's shape and dtype is known", _values_are_described),
    Rule("what describes a value takes no memory", _values_take_no_memory),
    Rule("no operator names another device than the CPU", _for_no_device),
    Rule("every tensor that is read is held by the weights or the constants", _tensors_are_held),
    Rule("every constant has its numbers", _constants_have_numbers),
    Rule("every tensor has the shape that the graph says", _shapes_agree),
    Rule("a tied parameter leads to one that is not tied itself", _ties_lead_somewhere),
)
