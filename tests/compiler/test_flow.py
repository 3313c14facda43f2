"""How often the work is done: one trace per model and shape, one search for sites per graph, names resolved once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import inputs

import sparsify
from sparsify.analysis.dimensions import groups
from sparsify.analysis.flow import Flow
from sparsify.analysis.linear import find_sites
from sparsify.compiler import pipeline, stages
from sparsify.frontend import capture
from sparsify.ir.program import Program
from sparsify.prune import names


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a graph is traced, each analysis is done, and names are resolved."""
    counts: Counter[str] = Counter()

    def count(owner: Any, name: str, what: str) -> None:
        whole = getattr(owner, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            counts[what] += 1
            return whole(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    count(capture, "export", "traces")
    count(names, "_Names", "names")
    found = Program.fact

    def fact(program: Program, analysis: Callable[[Program], Any]) -> Any:
        counts[analysis.__name__] += analysis not in program._facts
        return found(program, analysis)

    monkeypatch.setattr(Program, "fact", fact)
    return counts


Families = Callable[[str], Path]
SEARCH, FLOW, COUPLED = "_search", "_found", "_coupled"


def test_a_structural_pass_and_a_weight_pass(counted: Counter[str], folder: Families, tmp_path: Path) -> None:
    """The dense model is one model, the smaller one another."""
    data = [inputs("llama", rows=4)["input_ids"]]
    sparsify.compile(folder("llama"), ["llm-pruner:25%", "wanda:2:4"], calibration=data, output=tmp_path / "out")
    assert counted["traces"] == 2 and counted[SEARCH] == 2 and counted[FLOW] == 2 and counted[COUPLED] == 1


def test_every_round_of_a_structural_pass_is_one_model(counted: Counter[str], folder: Callable[[str], Path]) -> None:
    data = [inputs("llama", rows=2)["input_ids"]]
    sparsify.compile(folder("llama"), ["llm-pruner:50%,importance=l2,steps=2", "magnitude:2:4"], calibration=data)
    assert counted["traces"] == 3 and counted[SEARCH] == 3


def test_several_weight_passes_share_one_trace(counted: Counter[str], folder: Callable[[str], Path]) -> None:
    passes = ["wanda:2:4", "gblm:2:4", "twin:2:4,mask=zeros", "wanda:60%,allocation=owl"]
    sparsify.compile(folder("llama"), passes, calibration=[inputs("llama", rows=4)["input_ids"]])
    assert counted["traces"] == counted[SEARCH] == counted[FLOW] == 1


@pytest.mark.first(1)
@pytest.mark.parametrize("spec", ["wanda:2:4", "gblm:2:4", "magnitude:2:4"])
def test_data_of_a_name_have_the_expected_shape(spec: str, counted: Counter[str], bundled: Path) -> None:
    """Drawn after the trace, they fit it."""
    sparsify.compile(bundled, [spec], calibration="random", samples=6, sequence_length=12)
    assert counted["traces"] == 1


def test_data_that_turn_out_otherwise_cost_another_trace(counted: Counter[str], tmp_path: Path, bundled: Path) -> None:
    from safetensors.torch import save_file

    # A file of ready-made rows, of which there are fewer than a batch would take.
    save_file({"input_ids": torch.randint(9, (3, 12))}, tmp_path / "ids.safetensors")
    made = sparsify.compile(
        bundled, ["wanda:2:4"], calibration=str(tmp_path / "ids.safetensors"), samples=3, sequence_length=12
    )
    assert counted["traces"] == 1 and made.calibration is not None and made.calibration.sequences == 3


def test_names_are_resolved_once(counted: Counter[str], folder: Callable[[str], Path]) -> None:
    sparsify.compile(
        folder("llama"), ["llm-pruner:25%,importance=l2", "magnitude:2:4", "wanda:2:4"],
        calibration=[inputs("llama")["input_ids"]], only=["*mlp*"], ignore=["*self_attn*"],
    )  # fmt: skip
    assert counted["names"] == 1


def test_a_dry_run_traces_once(counted: Counter[str], folder: Callable[[str], Path]) -> None:
    sparsify.compile(folder("llama"), ["llm-pruner:25%", "wanda:2:4"], dry_run=True)
    assert counted["traces"] == 1


def test_facts_are_shared_and_stay_as_they_are(folder: Callable[[str], Path]) -> None:
    """A run over a program leaves its flow and its sites as they were: the next run finds them right."""
    source = sparsify.compile(folder("llama"), ["magnitude:2:4"], calibration=[inputs("llama")["input_ids"]])
    program = source.program
    uses = {node: tuple(positions) for node, positions in Flow.of(program).uses.items()}
    assert find_sites(program) is find_sites(program) and Flow.of(program) is Flow.of(program)
    assert {node: tuple(positions) for node, positions in Flow.of(program).uses.items()} == uses
    assert groups.coupled_dimensions(program) is groups.coupled_dimensions(program)


def test_compile_is_the_stages_in_their_order() -> None:
    """What house.md asks of it: seven calls that read like the sentence."""
    import inspect

    text = inspect.getsource(pipeline.compile).partition('"""\n    request')[2]
    order = ["parse(", "open_model(", "plan(", "draw(", "restructure(", "prune(", "finish("]
    places = [text.index(call) if call != "parse(" else -1 for call in order]
    assert places == sorted(places) and all(hasattr(stages, call[:-1]) for call in order[1:])
