"""Regions run one after the other: whatever the cuts and the memory, the graph gives what the module gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from support.families import inputs
from support.regions import CPU, Plain, execute
from torch import fx, nn

from sparsify.analysis.flow import Flow
from sparsify.calibration.activations import ActivationStore
from sparsify.calibration.interpreter import Interpreter, Region
from sparsify.errors import CalibrationError, TraceError
from sparsify.frontend.capture import capture
from sparsify.frontend.source import open_source
from sparsify.ir.program import Program


def test_a_spill_to_disk_changes_nothing(captured: Callable[[str], Program]) -> None:
    batches, program = [inputs("llama", seed=s) for s in range(3)], captured("llama")
    whole, spilled = execute(program, batches, cuts=7), execute(program, batches, cuts=7, budget=1000)
    assert all(torch.equal(a, b) for a, b in zip(whole, spilled, strict=True))


@pytest.mark.parametrize("cuts", [1, 2, 5, 9])
def test_any_module_in_regions(cuts: int) -> None:
    torch.manual_seed(0)
    module = Plain().eval()
    batches = [{"0": torch.randn(4, 8)} for _ in range(3)]
    program = capture(open_source(module), batches[0])
    for batch, result in zip(batches, execute(program, batches, cuts), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(result, module(batch["0"]), rtol=0, atol=1e-6)


class WrittenLate(nn.Module):
    """A value that is read, written to in place, and read again."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        start = x.cos()
        first = start.exp()
        start[..., 0] = 5
        return first.sin() + start * 2


@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_what_a_region_writes_to_is_what_later_ones_read(budget: int) -> None:
    module, batches = WrittenLate(), [{"0": torch.randn(4, 8)} for _ in range(2)]
    program = capture(open_source(module), batches[0])
    flow, results = Flow.of(program), list[torch.Tensor]()
    node = {n.name: n for n in flow.order}
    # The view through which it is written is made and used in one region.
    edges = [0, flow.position[node["exp"]] + 1, flow.position[node["fill_"]] + 1, len(flow.order)]
    with ActivationStore(budget) as store, torch.no_grad():
        runner = Interpreter(program, flow, batches, store, CPU)
        for start, stop in pairwise(edges):
            watch = [node["add"]] if stop == edges[-1] else []
            runner.run_region(
                Region(start, stop, edges[-1]), watch=watch, on_value=lambda i, n, values: results.append(values[n])
            )
    assert all(torch.equal(made, module(batch["0"])) for made, batch in zip(results, batches, strict=True))


def test_a_failing_node_names_its_source_line(captured: Callable[[str], Program]) -> None:
    with pytest.raises(TraceError, match=r"aten\.embedding.*modeling_llama"):
        execute(captured("llama"), [{"input_ids": torch.full((2, 16), 64)}])


class Steps(nn.Module):
    """Two values that are asked for apart, and one written to in place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        start = x.cos()
        first, second = start.exp(), start.sin()
        start.add_(1)
        return first + second * start


def test_a_region_that_runs_again_sees_what_it_saw_and_computes_what_is_wanted() -> None:
    """First the cosine; then the rest for one node alone, twice, which the write in place must not change."""
    x = torch.randn(3, 4)
    program = capture(open_source(Steps()), {"0": x})
    flow = Flow.of(program)
    end, node = len(flow.order), {n.name: n for n in flow.order}
    cut = flow.position[node["cos"]] + 1
    seen: list[tuple[str, torch.Tensor]] = []

    def note(index: int, node: fx.Node, values: Mapping[fx.Node, Any]) -> None:
        seen.append((node.name, values[node].clone()))

    watch = [node["exp"], node["sin"], node["add_"]]
    with ActivationStore(1 << 30) as store, torch.no_grad():
        runner = Interpreter(program, flow, [{"0": x}], store, CPU)
        runner.run_region(Region(0, cut, end))
        for _ in range(2):
            region = Region(cut, end, end, again=True, wanted={node["exp"]})
            runner.run_region(region, watch=watch[:2], on_value=note)
        for _ in range(2):
            runner.run_region(Region(cut, end, end, again=True), watch=watch, on_value=note)
        runner.run_region(Region(cut, end, end), watch=watch, on_value=note)
    expected = {"exp": x.cos().exp(), "sin": x.cos().sin(), "add_": x.cos() + 1}
    assert [name for name, _ in seen] == ["exp", "exp", *["exp", "sin", "add_"] * 3]
    assert all(torch.equal(value, expected[name]) for name, value in seen)


class Views(nn.Module):
    """Two views of one value, of which one is written to."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        start = x.cos()
        one, other = start[:, :2], start[:, 2:]
        one.add_(1)
        return one + other + start[:, 1:3]


def test_a_write_to_one_of_two_living_views_cannot_be_run_again() -> None:
    """Each run would need a copy of both that is one memory still."""
    x = torch.randn(3, 4)
    program = capture(open_source(Views()), {"0": x})
    flow = Flow.of(program)
    end = len(flow.order)
    cut = min(flow.position[n] for n in flow.order if "add_" in n.name)
    with ActivationStore(1 << 30) as store, torch.no_grad():
        runner = Interpreter(program, flow, [{"0": x}], store, CPU)
        runner.run_region(Region(0, cut, end))
        with pytest.raises(TraceError, match="two views are alive"):
            runner.run_region(Region(cut, end, end, again=True))


def test_a_device_without_memory_is_told_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as a node that fails; and what would help is said."""
    program = capture(open_source(Steps()), {"0": torch.randn(3, 4)})

    def full(self: Interpreter, *what: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Interpreter, "call_function", full)
    with pytest.raises(CalibrationError, match=r"out of memory \(no room\)"):
        execute(program, [{"0": torch.randn(3, 4)}])
