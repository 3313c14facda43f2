"""Every rule of a program has a test that breaks it, and is found where it is broken."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsify.data.batches import example_batch
from sparsify.errors import VerifyError
from sparsify.frontend.capture import capture
from sparsify.frontend.source import open_source
from sparsify.ir.program import Program
from sparsify.ir.rules import RULES, broken_rules
from sparsify.ir.store import MemoryStore
from sparsify.ir.weights import Weights


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("shift", torch.ones(4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x) + self.shift)


@pytest.fixture
def program() -> Program:
    return capture(open_source(Net()), {"0": torch.zeros(3, 4)})


def node(program: Program, op: str, number: int = 0) -> torch.fx.Node:
    return [n for n in program.graph.nodes if n.op == op][number]


def out_of_order(program: Program) -> None:
    node(program, "call_function", -1).append(node(program, "call_function"))


def nested(program: Program) -> None:
    program.graph_module.add_module("inner", nn.ReLU())
    made = program.graph.call_module("inner", (node(program, "placeholder"),))
    made.meta["val"] = node(program, "placeholder").meta["val"]


def higher_order(program: Program) -> None:
    made = program.graph.call_function(torch.ops.higher_order.cond, (node(program, "placeholder"),))
    made.meta["val"] = node(program, "placeholder").meta["val"]


def two_outputs(program: Program) -> None:
    program.graph.create_node("output", "output", (node(program, "placeholder"),))


def no_input_name(program: Program) -> None:
    del node(program, "placeholder").meta["input"]


def too_many_names(program: Program) -> None:
    program.output_names.append("more")


def no_value(program: Program) -> None:
    del node(program, "call_function").meta["val"]


def a_real_value(program: Program) -> None:
    node(program, "call_function").meta["val"] = torch.zeros(3, 4)


def the_meta_device(program: Program) -> None:
    made = program.graph.call_function(torch.ops.aten.zeros.default, ([2],), {"device": torch.device("meta")})
    made.meta["val"] = torch.empty(2, device="meta")


def a_gpu(program: Program) -> None:
    made = program.graph.call_function(torch.ops.aten.zeros.default, ([2],), {"device": torch.device("cuda")})
    made.meta["val"] = torch.empty(2, device="meta")


def no_tensor(program: Program) -> None:
    reading = node(program, "get_attr")
    reading.target = "gone"
    program.graph_module.gone = nn.Parameter(torch.empty(4, 4, device="meta"))


def no_numbers(program: Program) -> None:
    name = next(iter(program.constants))
    program.constants[name] = program.constants[name].to("meta")


def another_shape(program: Program) -> None:
    held = {name: program.weights.read(name) for name in program.weights.parameters()}
    held["one.weight"] = torch.zeros(5, 4)
    program.weights = Weights(MemoryStore(None, held), {name: name for name in held})


def a_tie_to_a_tie(program: Program) -> None:
    program.weights.aliases |= {"three.weight": "two.weight", "four.weight": "three.weight"}


BREAKS: dict[str, tuple[Callable[[Program], None], ...]] = {
    "nodes stand after what they read, and the graph lints": (out_of_order,),
    "the graph is flat: inputs, tensors, functions and one output, nothing nested": (nested, higher_order),
    "the graph has one output": (two_outputs,),
    "every input carries the name by which batches give it, once": (no_input_name,),
    "there is a name for every output": (too_many_names,),
    "every value's shape and dtype is known": (no_value,),
    "what describes a value takes no memory": (a_real_value,),
    "no operator names another device than the CPU": (the_meta_device, a_gpu),
    "every tensor that is read is held by the weights or the constants": (no_tensor,),
    "every constant has its numbers": (no_numbers,),
    "every tensor has the shape that the graph says": (another_shape,),
    "a tied parameter leads to one that is not tied itself": (a_tie_to_a_tie,),
}


def test_every_rule_is_broken_below() -> None:
    assert [rule.sentence for rule in RULES] == list(BREAKS)


EACH = [(sentence, breaks) for sentence, every in BREAKS.items() for breaks in every]


@pytest.mark.parametrize(("sentence", "breaks"), EACH, ids=lambda x: getattr(x, "__name__", ""))
def test_a_broken_rule_is_named(sentence: str, breaks: Callable[[Program], None], program: Program) -> None:
    program.verify()
    breaks(program)
    (own,) = [rule for rule in RULES if rule.sentence == sentence]
    assert list(own.check(program))
    with pytest.raises(VerifyError) as caught:
        program.verify()
    # An earlier rule may see the same damage; it is still this one that says it in full.
    assert any(rule.sentence in str(caught.value) for rule, _ in broken_rules(program))


@pytest.mark.parametrize("family", ["llama", "mixtral", "t5", "mamba", "vit"])
def test_every_rule_holds_after_capture(family: str, folder: Callable[[str], Path]) -> None:
    source = open_source(folder(family))
    assert list(broken_rules(capture(source, example_batch(source)))) == []


def test_facts_are_found_once_and_dropped_when_the_graph_changes(program: Program) -> None:
    looked = []

    def count(given: Program) -> int:
        looked.append(given)
        return len(given.nodes)

    before = program.fact(count)
    assert program.fact(count) == before and len(looked) == 1
    with program.graph.inserting_before(node(program, "output")):
        made = program.graph.call_function(torch.ops.aten.relu.default, (node(program, "placeholder"),))
        made.meta["val"] = node(program, "placeholder").meta["val"]
    program.changed()
    assert program.fact(count) == before + 1 and len(looked) == 2
    assert dataclasses.replace(program).fact(count) == before + 1 and len(looked) == 3
