"""Operators that come apart one by one, before ONNX: what they compute stays, whatever writes in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsify.backends.onnx.tracing.decomposed import decompose_apart

TABLE = {
    op: function
    for op, function in torch.export.default_decompositions().items()
    if op not in (torch.ops.aten.linear.default, torch.ops.aten.matmul.default)
}

# Of one tensor or two, that give a new one, another view of the same memory, or write. Dropout is not among them: torch
# itself, decomposing, forgets that it may give its own input.
STEPS: dict[str, Callable[..., Any]] = {
    "new": lambda a, b: a + b,
    "view": lambda a, b: a.view(a.shape),
    "reshape": lambda a, b: a.reshape(-1, 2, 2).reshape(a.shape),
    "turned": lambda a, b: a.transpose(1, 2),
    "turned and copied": lambda a, b: a.transpose(1, 2).reshape(a.shape[0], 4).reshape(a.shape),
    "part": lambda a, b: a.narrow(1, 0, 2),
    "to": lambda a, b: a.to(torch.float32),
    "contiguous": lambda a, b: a.contiguous(),
    "detached": lambda a, b: a.detach(),
    "sorted": lambda a, b: torch.topk(a, 2, dim=-1)[0],
    "products": lambda a, b: torch.einsum("bij,bjk->bik", a, b),
    "add": lambda a, b: a.add_(b),
    "double": lambda a, b: a.mul_(2),
    "rounds": lambda a, b: a.mul_(0.5).add_(1),
    "part written": lambda a, b: a[:, :1].add_(1),
    "copied": lambda a, b: a.copy_(b),
    "row copied": lambda a, b: a[:, 0].copy_(b[:, 1]),
    "assigned": lambda a, b: a.__setitem__((slice(None), 0), 3.0),
    "masked": lambda a, b: a.masked_fill_(b > 0, -1.0),
    "clone": lambda a, b: a.clone(),
}


class Steps(nn.Module):
    """Steps on the tensors that earlier ones made, ``(name, first, second)``; gives the ``last`` of all."""

    def __init__(self, steps: list[tuple[str, int, int]], last: int) -> None:
        super().__init__()
        self.steps, self.last = steps, last

    def forward(self, x: Tensor) -> list[Tensor]:
        made = [x * 1.5, x - 2]
        for name, first, second in self.steps:
            given = made[first % len(made)]
            result = STEPS[name](given, made[second % len(made)])
            made.append(given if result is None else result)
        return [each + 0 for each in made[-self.last :]]


def example(rows: int) -> Tensor:
    return torch.arange(rows * 4, dtype=torch.float32).reshape(rows, 2, 2).sin()


def both_ways(steps: list[tuple[str, int, int]], last: int = 4) -> tuple[torch.export.ExportedProgram, bool]:
    """The decomposed program, and whether it came apart node by node.

    Its answers are those of torch's whole way: a module that reads the memory it writes gives what it likes."""
    module = Steps(steps, last)
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    try:  # a tensor that is written may lie upon itself, and some torch cannot trace
        module(example(3))
        exported = torch.export.export(module, (example(3),), dynamic_shapes=shapes, strict=False)
    except Exception:
        reject()
    whole = exported.run_decompositions(TABLE)
    decompose_apart(exported)
    decomposed = exported.run_decompositions(TABLE)
    for rows in (3, 5):
        for got, want in zip(decomposed.module()(example(rows)), whole.module()(example(rows)), strict=True):
            assert torch.equal(got, want), decomposed.graph
    return decomposed, decomposed is exported


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8)
)
def test_any_steps_give_what_they_gave(steps: list[tuple[str, int, int]]) -> None:
    both_ways(steps)


@pytest.mark.parametrize(
    ("steps", "apart"),
    [
        ([("add", 0, 1), ("double", 0, 0)], True),
        ([("turned", 0, 0), ("double", 2, 2)], True),
        ([("sorted", 0, 0), ("double", 2, 2)], True),
        ([("turned", 0, 0), ("double", 2, 2), ("new", 0, 1)], False),
        ([("view", 0, 0), ("double", 0, 0), ("new", 2, 1)], False),
        ([("row copied", 0, 1), ("new", 0, 1)], False),
    ],
    ids=["itself", "a view alone", "one of several", "a view beside what it is of", "an older view", "a part"],
)
def test_what_writes_comes_apart_where_no_other_name_is_read(steps: list[tuple[str, int, int]], apart: bool) -> None:
    decomposed, alone = both_ways(steps, last=1)
    assert not any(
        getattr(node.target, "_schema", None) and node.target._schema.is_mutable for node in decomposed.graph.nodes
    )
    assert alone == apart


def test_what_may_give_its_own_input_shares_its_memory() -> None:
    module = Steps([], 1)
    module.forward = lambda x: (torch.nn.functional.dropout(y := x * 2, training=False).mul_(2), y)[0]  # type: ignore[assignment]
    exported = torch.export.export(module, (example(3),), strict=False)
    decompose_apart(exported)
    assert torch.equal(exported.run_decompositions(TABLE).module()(example(3)), example(3) * 4)


def test_what_repeats_comes_apart_once() -> None:
    """As many layers as there may be: each operator of one shape is looked into once."""
    decomposed, alone = both_ways([("products", i, i + 1) for i in range(6)])
    assert alone
    assert not any("einsum" in str(node.target) for node in decomposed.graph.nodes)
