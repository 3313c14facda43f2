"""A run that was interrupted and went on leaves what one that was not would have left, to the last byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.families import deep
from support.interrupted import IDS, content, hidden, interrupted_after
from torch import Tensor

import sparsify
from sparsify.analysis.graph_pass import GraphPass
from sparsify.analysis.linear import find_sites
from sparsify.journal.left import left_of


class Halve(GraphPass):
    """Sees the program as a whole, and changes weights alone."""

    name = "halve"
    summary = "all linear weights, halved"

    def apply(self, program: Any, batches: Any, context: Any) -> None:
        for parameter in dict.fromkeys(site.parameter for site in find_sites(program)[0]):
            program.weights.write(parameter, program.weights.read(parameter) / 2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    place = tmp_path_factory.mktemp("models")

    def model(family: str) -> Path:
        if not (place / family).exists():
            deep(family, 2).save_pretrained(place / family)
        return place / family

    return model


def goes_on(model: Any, passes: list[Any], place: Path, *, once: bool = False, **options: Any) -> None:
    """Interrupt a run at its first part, in its middle (``once``: there alone) and at its last, each time go on, and
    compare the outputs.

    The output has one name in all runs: some write it.
    """
    given: dict[str, Any] = {"calibration": IDS, **options}
    with interrupted_after(0) as parts:
        sparsify.compile(model, passes, output=place / "whole" / "out", **given)
    assert parts[0] >= 2 and not hidden(place / "whole")
    expected = content(place / "whole" / "out")
    for at in sorted({parts[0] // 2} | (set() if once else {1, parts[0]})):
        out = place / str(at) / "out"
        with interrupted_after(at), pytest.raises(KeyboardInterrupt):
            sparsify.compile(model, passes, output=out, **given)
        assert not out.exists() and [left.finished for left in left_of(out)] == [at]
        with interrupted_after(0) as more:
            sparsify.compile(model, passes, output=out, resume=True, **given)
        # A pass that sees the graph as a whole is finished or is not.
        anew = at < parts[0] and isinstance(passes[0], GraphPass)
        assert more == [parts[0] if anew else parts[0] - at]
        assert content(out) == expected and not hidden(out.parent)


PASSES: dict[str, list[Any]] = {
    "a method of one forward": ["wanda:2:4"],
    "one that moves weights": ["sparsegpt:2:4"],
    "one without data": ["magnitude:50%"],
    "one of two streams": ["twin:2:4"],
    "gradients": ["gblm:2:4"],
    "an allocation": ["wanda:50%,allocation=owl"],
    "two on the same weights": ["wanda:2:4", "round:int4"],
    "trained blocks": ["twin:2:4", "refine:epochs=2,batch=2"],
    "another order": ["permute:2:4", "wanda:2:4"],
    "a smaller model in rounds": ["llm-pruner:25%,steps=2,importance=l1", "wanda:50%"],
    "without blocks": ["llm-pruner:50%,granularity=layer,importance=l1", "wanda:50%"],
    "the graph as a whole": [Halve(), "wanda:2:4"],
}


@pytest.mark.first(3)
@pytest.mark.parametrize("what", PASSES)
def test_every_kind_of_pass(what: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    goes_on(models("llama"), PASSES[what], tmp_path)


@pytest.mark.first(1)
@pytest.mark.parametrize("schedule", ["block", "dense"])
def test_every_schedule(schedule: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    goes_on(models("llama"), ["sparsegpt:2:4"], tmp_path, schedule=schedule)


@pytest.mark.first(1)
@pytest.mark.parametrize("family", ["mixtral", "gpt2", "opt"])
def test_experts_and_biases(family: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    goes_on(models(family), ["twin:2:4"], tmp_path)


@pytest.mark.first(2)
@pytest.mark.slow
@pytest.mark.parametrize("to", ["packed:choice=smallest", "packed:choice=smallest,values=int8", "onnx", "cuda"])
def test_every_target(to: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    if to == "onnx":
        pytest.importorskip("onnx")
    goes_on(models("llama"), ["wanda:2:4"], tmp_path, once=True, to=to)


def test_a_module_in_memory(tmp_path: Path) -> None:
    goes_on(deep("llama", 1), ["wanda:2:4"], tmp_path, once=True)


def test_parts_of_a_stack_of_experts(models: Callable[[str], Path], tmp_path: Path) -> None:
    """Of a parameter that is several tensors some are ignored: what is kept of it is what was there."""
    goes_on(models("mixtral"), ["wanda:2:4"], tmp_path, ignore=["*experts.1.*"])


def test_what_it_is_written_as_may_be_another(models: Callable[[str], Path], tmp_path: Path) -> None:
    """So that a target that refused the result at last costs no pruning."""
    out, given = tmp_path / "out", {"calibration": IDS}
    with interrupted_after(7), pytest.raises(KeyboardInterrupt):
        sparsify.compile(models("llama"), "wanda:2:4", output=out, to="packed", **given)
    sparsify.compile(models("llama"), "wanda:2:4", output=out, memory="1MiB", resume=True, **given)
    sparsify.compile(models("llama"), "wanda:2:4", output=tmp_path / "whole", **given)
    assert content(out) == content(tmp_path / "whole")


def test_interrupted_again_and_again(models: Callable[[str], Path], tmp_path: Path) -> None:
    out, given = tmp_path / "out", {"calibration": IDS}
    for number in range(14):
        with interrupted_after(1), pytest.raises(KeyboardInterrupt):
            sparsify.compile(models("llama"), "wanda:2:4", output=out, resume=number > 0, **given)
    with interrupted_after(0) as more:
        sparsify.compile(models("llama"), "wanda:2:4", output=out, resume=True, **given)
    sparsify.compile(models("llama"), "wanda:2:4", output=tmp_path / "whole", **given)
    assert more == [0] and content(out) == content(tmp_path / "whole")


def test_without_a_journal_nothing_is_kept(models: Callable[[str], Path], tmp_path: Path) -> None:
    with interrupted_after(1) as parts:
        sparsify.compile(models("llama"), "wanda:2:4", output=tmp_path / "out", calibration=IDS, journal=False)
        sparsify.compile(models("llama"), "wanda:2:4", calibration=IDS)
    assert parts == [0]


def test_what_is_finished_is_not_pruned_again(models: Callable[[str], Path], tmp_path: Path) -> None:
    """Going on costs a forward of it, and no solving."""
    from sparsify.passes.sparsegpt import SparseGPT

    out, calls, real = tmp_path / "out", [0], SparseGPT.prune

    def prune(self: SparseGPT, *given: Any) -> Any:
        calls[0] += 1
        return real(self, *given)

    with interrupted_after(10), pytest.raises(KeyboardInterrupt):
        sparsify.compile(models("llama"), "sparsegpt:2:4", output=out, calibration=IDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SparseGPT, "prune", prune)
        result = sparsify.compile(models("llama"), "sparsegpt:2:4", output=out, calibration=IDS, resume=True)
    assert calls == [14 - 10] and len(result.runs[0].sites) == 14
    weight: Tensor = result.weight("model.layers.0.mlp.up_proj.weight")
    assert int((weight != 0).sum()) == weight.numel() // 2
