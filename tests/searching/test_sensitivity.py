"""``sensitivity``: each part alone, against pruning it by a compile; totals, the ignore line, the picture, refusals."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command_line import sparsify as command
from torch import nn

import sparsify
from sparsify.errors import BackendError, SparsifyError, SpecError
from sparsify.frontend.source import open_source
from sparsify.searching.costs import Sensitivity, worst


@pytest.fixture(scope="module")
def model(folder: Callable[[str], Path]) -> Path:
    return folder("llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "held.safetensors"
    save_file({"input_ids": torch.randint(3, 60, (3000,), generator=torch.Generator().manual_seed(0))}, path)
    return path


def measured(model: Path, text: Path, spec: str = "wanda:2:4", **words: Any) -> Sensitivity:
    words = {"samples": 4, "sequence_length": 32, "windows": 4, **words}
    return sparsify.sensitivity(model, spec, data=text, **words)


@pytest.mark.first(4)
@pytest.mark.parametrize("spec", ["wanda:2:4", "twin:2:4", "sparsegpt:50%", "magnitude:50%", "gblm:50%"])
@pytest.mark.parametrize("measure", ["perplexity", "kl"])
def test_a_part_costs_what_pruning_it_alone_costs(spec: str, measure: str, model: Path, text: Path) -> None:
    found = measured(model, text, spec, measure=measure)
    assert len(found.costs) == 8 and found.measure == measure
    ids, data = load_file(text)["input_ids"], spec != "magnitude:50%"
    windows = ids[2700:2828].view(4, 32) if data else ids[:128].view(4, 32)
    cost = found.costs[3]
    assert cost.sites == ("model.layers.1.self_attn.o_proj",)
    save_file({"input_ids": ids[:2700]}, text.parent / "first.safetensors")
    made = sparsify.compile(
        model, [spec], only=list(cost.sites), calibration=str(text.parent / "first.safetensors") if data else None,
        samples=4, sequence_length=32,
    )  # fmt: skip
    dense, pruned = _logits(open_source(model), windows, model), _run(made.model, windows)
    if measure == "kl":
        wanted = torch.nn.functional.kl_div(pruned.log_softmax(-1), dense.softmax(-1), reduction="none").sum(-1).mean()
        assert cost.loss == pytest.approx(float(wanted), rel=1e-3, abs=1e-7) and cost.perplexity is None
    else:
        grown = _loss(pruned, windows) - _loss(dense, windows)
        assert cost.loss == pytest.approx(grown, rel=1e-3, abs=1e-5)
        assert cost.perplexity == pytest.approx(math.exp(_loss(pruned, windows)), rel=1e-4)


def _logits(source: Any, windows: torch.Tensor, model: Path) -> torch.Tensor:
    return _run(sparsify.load(model), windows)


def _run(net: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return net.eval()(windows.long()).logits.double()  # type: ignore[no-any-return]


def _loss(logits: torch.Tensor, windows: torch.Tensor) -> float:
    return float(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten().long()))


def test_totals_ranks_and_what_is_saved(model: Path, text: Path) -> None:
    found = measured(model, text, leave=0.4)
    assert found.ranked == sorted(found.costs, key=lambda cost: -cost.loss)
    assert list(found.kinds.values()) == sorted(found.kinds.values(), reverse=True)
    assert sum(found.kinds.values()) == pytest.approx(found.total) == pytest.approx(sum(found.blocks.values()))
    assert list(found.blocks) == ["model.layers.0", "model.layers.1"]
    assert sum(cost.weights for cost in found.costs) == found.weights
    saving = found.saving
    assert saving.share >= 0.4 and 0 < saving.weights < found.weights
    words = shlex.split(found.ignore_line)
    assert words[::2] == ["--ignore"] * len(saving.ignore) and tuple(words[1::2]) == saving.ignore
    # Both perplexities are those of compiles.
    save_file({"input_ids": load_file(text)["input_ids"][:2700]}, text.parent / "first.safetensors")
    windows = load_file(text)["input_ids"][2700:2828].view(4, 32)
    for ignore, expected in (((), saving.before), (saving.ignore, saving.after)):
        made = sparsify.compile(
            model, ["wanda:2:4"], ignore=ignore, calibration=str(text.parent / "first.safetensors"), samples=4,
            sequence_length=32,
        )  # fmt: skip
        assert math.exp(_loss(_run(made.model, windows), windows)) == pytest.approx(expected, rel=1e-4)
    said = repr(found)
    assert said.startswith("<sensitivity of llama to wanda:2:4") and len(said) < 500 and found.ignore_line in said


@pytest.mark.slow
def test_at_the_command_line(model: Path, text: Path, tmp_path: Path) -> None:
    words = ["sensitivity", model, "--pass", "wanda:2:4", "--data", text, "--windows", 4, "--samples", 4,
             "--sequence-length", 32]  # fmt: skip
    done = command(*words, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("--ignore ") for line in lines) and "q/k/v_proj" in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"sensitivity.{kind}" for kind in ("json", "md", "png", "svg")
    ]
    record = json.loads((tmp_path / "out" / "sensitivity.json").read_text())
    assert len(record["ranked"]) == 8 and record["meaning"].startswith("growth of the mean loss")
    assert (tmp_path / "out" / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    assert "o_proj" in (tmp_path / "out" / "sensitivity.md").read_text()
    found = json.loads(command(*words, "--json", "--leave", 60, "--measure", "kl").stdout)
    assert found["measure"] == "kl" and found["saving"]["share"] >= 0.6
    assert command(*words, "-o", tmp_path / "out").returncode == 1
    assert command(*words, "-o", tmp_path / "out", "--overwrite").returncode == 0


def test_many_parts_are_measured_by_fewer_windows(model: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsify.searching.sensitivity._MANY", 5)
    monkeypatch.setattr("sparsify.searching.sensitivity._FEW_WINDOWS", 2)
    found = measured(model, text, windows=None)
    assert found.measure == "kl" and found.data.startswith("2 windows of 32 tokens")
    assert measured(model, text, windows=3).data.startswith("3 windows of 32 tokens")


@pytest.mark.parametrize(
    ("words", "kind", "says"),
    [
        ({"spec": "wanda"}, SpecError, "no pattern"),
        ({"spec": "refine"}, SpecError, "does not prune weight by weight"),
        ({"spec": "llm-pruner:50%"}, SpecError, "does not prune weight by weight"),
        ({"measure": "accuracy"}, SpecError, "no such measure"),
        ({"leave": 0.0}, SpecError, "not between 0 and 1"),
        ({"leave": 1.0}, SpecError, "not between 0 and 1"),
        ({"data": "missing.txt"}, SparsifyError, "no such file"),
        ({"only": ["*.nothing"]}, SpecError, "matches no parameter"),
        ({"ignore": ["model.layers"]}, SpecError, "nothing to prune"),
        ({"samples": -1}, SpecError, "fewer than one"),
    ],
)
def test_what_cannot_be_measured_is_refused_and_nothing_written(
    words: dict[str, Any], kind: type[SparsifyError], says: str, model: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=says):
        measured(model, words.pop("data", text), output=tmp_path / "out", **words)
    assert not list(tmp_path.iterdir())


def test_a_single_part_is_told_and_nothing_left_dense(model: Path, text: Path) -> None:
    found = measured(model, text, only=["model.layers.0.self_attn.o_proj"])
    assert len(found.costs) == 1 and found.saving.ignore == () and found.saving.before == found.saving.after
    assert found.ignore_line == "" and repr(found)


def test_a_source_is_not_written(model: Path, text: Path) -> None:
    with pytest.raises(BackendError):
        measured(model, text, output=model / "inside")


def test_the_worst_are_those_that_cost_most_for_each_weight() -> None:
    sizes, losses = [10, 1, 5, 5], [1.0, 0.5, 0.0, -3.0]
    assert worst(sizes, losses, 0.3) == [1] and worst(sizes, losses, 0.4) == [0, 1]
    assert worst(sizes, losses, 0.99) == [0, 1] and worst(sizes, [0.0] * 4, 0.5) == []
