"""``search`` end to end: within its budget, resumed, recorded, refused."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command_line import sparsify as command

import sparsify
from sparsify.context import Progress
from sparsify.errors import BackendError, CalibrationError, SparsifyError, SpecError, VerifyError
from sparsify.evaluation.evaluate import evaluate
from sparsify.files.ownership import Claim
from sparsify.method.spec import parse_pass
from sparsify.searching import search as searching
from sparsify.searching.found import Found
from sparsify.searching.trials import Trial, Trials


@pytest.fixture(scope="module")
def model(folder: Callable[[str], Path]) -> Path:
    return folder("llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token ids of a small vocabulary, which need no tokenizer."""
    path = tmp_path_factory.mktemp("text") / "held.safetensors"
    save_file({"input_ids": torch.randint(3, 60, (3000,), generator=torch.Generator().manual_seed(0))}, path)
    return path


def seek(model: Path, text: Path, spec: str = "wanda", budget: str = "perplexity<=1.002", **words: Any) -> Found:
    words = {"samples": 4, "sequence_length": 32, "windows": 4, **words}
    return sparsify.search(model, spec, budget=budget, data=text, **words)


def bits(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    first, second = bits(one), bits(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("spec", "schedule"),
    [
        ("wanda", "layer"),
        ("wanda", "dense"),
        ("sparsegpt,compensation=exact", "layer"),
        ("magnitude", "block"),
        ("wanda:2:4", "dense"),
        ("wanda:60%,group=layer", "block"),
    ],
)
def test_what_is_found_is_within_and_the_words_that_it_prints_prune_so(
    spec: str, schedule: Any, model: Path, text: Path, tmp_path: Path
) -> None:
    found = seek(model, text, spec, output=tmp_path / "out", schedule=schedule)
    assert found.output == tmp_path / "out" and 0 < found.sparsity < 1
    kinds = len({name.partition(" of ")[0] for name in found.shares})
    assert kinds == 4 and len(found.trials) <= 8 * (kinds + 1)
    assert found.perplexity <= found.limit == pytest.approx(1.002 * found.dense)
    assert found.best.sparsity == max(t.sparsity for t in found.trials if t.perplexity <= found.limit)
    # The folder is judged as it lies there, by the text that the search held out.
    ids = load_file(text)["input_ids"]
    save_file({"input_ids": ids if spec == "magnitude" else ids[2700:]}, tmp_path / "judge.safetensors")
    for name, expected in ((model, found.dense), (found.output, found.perplexity)):
        judged = evaluate(name, str(tmp_path / "judge.safetensors"), sequence_length=32, windows=4)
        assert judged.perplexity == pytest.approx(expected, rel=1e-6)
    words = found.words
    sparsify.compile(
        model, [found.best.spec], ignore=words[3::2], output=tmp_path / "again", calibration=_given(found, text),
        schedule=schedule,
    )  # fmt: skip
    assert words[:2] == ["--pass", found.best.spec] and set(words[2::2]) <= {"--ignore"}
    assert same(tmp_path / "again", found.output)


def _given(found: Found, text: Path) -> Any:
    return None if found.compiled is None else found.compiled.calibration


def test_the_folder_says_by_which_search_it_was_found(model: Path, text: Path, tmp_path: Path) -> None:
    found = seek(model, text, output=tmp_path / "out")
    record = json.loads((tmp_path / "out" / "sparsify.json").read_text())["search"]
    assert record["budget"] == "perplexity<=1.002x" and record["spec"] == found.best.spec
    assert len(record["trials"]) == len(found.trials) and record["sparsity"] == found.sparsity
    assert "(its last 10%, held out)" in record["data"] and "(its first 90%)" in record["calibration"]
    assert command("verify", tmp_path / "out").returncode == 0
    assert not {"seconds", "kept", "output", "resumed"} & {*record, *record["trials"][0]}, "no time and no place"
    assert str(found).startswith("<") and len(str(found)) < 400 and f"{found.sparsity:.2%} zeros" in str(found)


@pytest.mark.slow
def test_an_interrupted_search_goes_on(model: Path, text: Path, tmp_path: Path) -> None:
    whole = seek(model, text, output=tmp_path / "whole")
    out, told = tmp_path / "out", list[str]()

    def stop(text: str) -> None:
        told.append(text)
        if len(told) == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        seek(model, text, output=out, tell=stop)
    assert not out.exists() and len(list((tmp_path / "out.search").iterdir())) == 1
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    pruned: list[Progress] = []
    found = seek(model, text, output=out, tell=told.append, observe=pruned.append)
    assert found.resumed == 11 and sum("kept from before" in line for line in told) == 11
    assert [t.shares for t in found.trials] == [t.shares for t in whole.trials] and same(out, tmp_path / "whole")
    # All is known now: nothing but the output is made once more. Another budget is no other question.
    again = seek(model, text, output=out, overwrite=True)
    assert (
        again.resumed == len(found.trials) and again.best.shares == found.best.shares and same(out, tmp_path / "whole")
    )
    assert seek(model, text, output=out, overwrite=True, budget="perplexity<=1.004").resumed == again.resumed
    # Another seed is: its trials lie beside.
    assert seek(model, text, output=out, overwrite=True, seed=1).resumed == 0
    assert len(list((tmp_path / "out.search").iterdir())) == 2


@pytest.mark.slow
def test_a_budget_that_nothing_meets(bundled: Path, tmp_path: Path) -> None:
    words: dict[str, Any] = {"data": "python-stdlib", "windows": 4, "sequence_length": 64}
    only = ["model.layers.0.mlp.gate_proj"]
    with pytest.raises(CalibrationError) as caught:
        sparsify.search(
            bundled, "magnitude:1:16", budget="perplexity<=1.01", output=tmp_path / "out", only=only, **words
        )
    assert "none of 1 trials met it: nearest came --pass magnitude:1:16 with" in str(caught.value)
    assert "times the dense model's" in str(caught.value) and not (tmp_path / "out").exists()
    with pytest.raises(CalibrationError, match="the dense model itself has"):
        sparsify.search(bundled, "magnitude", budget="perplexity<=1.5abs", output=tmp_path / "out", **words)
    assert not (tmp_path / "out").exists()


def test_in_python_nothing_need_be_written(model: Path, text: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    found = seek(model, text)
    assert found.compiled is not None and found.output is None and found.kept is None and not list(tmp_path.iterdir())
    zeros = sum(int((found.compiled.weight(site.parameter) == 0).sum()) for site in found.compiled.runs[0].sites)
    assert zeros == pytest.approx(found.sparsity * found.weights, abs=1)


@pytest.mark.slow
def test_a_module_in_memory(text: Path, model: Path) -> None:
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(model)
    assert seek(net, text).best.shares == seek(model, text).best.shares  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "kind", "says"),
    [
        ({"spec": "nothing"}, SpecError, "nothing of that name"),
        ({"spec": "llm-pruner"}, SpecError, "does not prune weight by weight"),
        ({"spec": "refine"}, SpecError, "does not prune weight by weight"),
        ({"spec": "wanda,kinds=o_proj@40%"}, SpecError, "which are searched"),
        ({"spec": "wanda,allocation=owl"}, SpecError, "Leave allocation out"),
        ({"budget": "perplexity<1.05"}, SpecError, "for <="),
        ({"schedule": "never"}, SpecError, "no such schedule"),
        ({"samples": 0}, SpecError, "fewer than one"),
        ({"data": "missing.txt"}, SparsifyError, "no such file"),
        ({"calibration": "missing.txt"}, SparsifyError, "no such file"),
        ({"only": ["*.nothing"]}, SpecError, "matches no parameter"),
        ({"ignore": ["model.layers"]}, SpecError, "nothing to prune"),
        ({"only": ["lm_head"], "ignore": ["lm_head"]}, SpecError, "nothing to prune"),
        ({"to": "floppy"}, SpecError, "nothing of that name"),
    ],
)
def test_what_cannot_be_searched_is_refused_and_nothing_written(
    words: dict[str, Any], kind: type[SparsifyError], says: str, model: Path, text: Path, tmp_path: Path
) -> None:
    data = words.pop("data", text)
    with pytest.raises(kind, match=says):
        seek(model, data, output=tmp_path / "out", **words)
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_there_is_told_before_the_work(model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("two years")
    told: list[str] = []
    for overwrite, says in ((False, "it exists already"), (True, "nothing by which it is an output of sparsify")):
        with pytest.raises(BackendError, match=says):
            seek(model, text, output=tmp_path / "out", overwrite=overwrite, tell=told.append)
    with Claim(tmp_path / "other"), pytest.raises(BackendError, match="another job is writing it now"):
        seek(model, text, output=tmp_path / "other", tell=told.append)
    assert not told and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_model_that_is_not_as_good_as_its_trial_is_not_written(model: Path, text: Path, tmp_path: Path) -> None:
    found = seek(model, text, output=tmp_path / "out")
    kept = next((tmp_path / "out.search").iterdir())
    first, *lines = kept.read_text().splitlines()
    # As if the trials had been made where sums come out otherwise: all are within.
    better = [json.dumps({**json.loads(line), "perplexity": found.dense * 0.9}) for line in lines]
    kept.write_text("\n".join([first, *better]) + "\n")
    with pytest.raises(VerifyError, match="where the trial had"):
        seek(model, text, output=tmp_path / "out", overwrite=True, budget=f"perplexity<={found.dense * 1.000001}abs")
    assert json.loads((tmp_path / "out" / "sparsify.json").read_text())["search"]["budget"] == "perplexity<=1.002x"


def test_at_the_command_line(model: Path, text: Path, tmp_path: Path) -> None:
    words = ["search", model, "--pass", "wanda:2:4", "--budget", "perplexity<=+0.2%", "--data", text, "--windows", 4,
             "--samples", 4, "--sequence-length", 32, "-o", tmp_path / "out"]  # fmt: skip
    done = command(*words)
    assert done.returncode == 0, done.stderr
    assert "1: all of them" in done.stderr and "all of them" not in done.stdout
    said = " ".join(done.stdout.split())
    for part in (
        "within perplexity<=1.002x",
        f"the same again: sparsify compile {model} --pass wanda:2:4",
        "every trial",
    ):
        assert part in said, part
    # The line that is printed, and the folder as a recipe, make the same weights.
    line = next(one for one in done.stdout.splitlines() if one.startswith("the same again: "))
    again = shlex.split(line.removeprefix("the same again: sparsify "))
    from_folder = ("compile", "--recipe", tmp_path / "out", "-o", tmp_path / "recipe")
    for call in ((*again[:-1], tmp_path / "line"), from_folder):
        assert (ran := command(*call)).returncode == 0, ran.stderr
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("out", "line", "recipe")]
    assert weights[0] == weights[1] == weights[2]
    assert "--budget" not in (card := (tmp_path / "out" / "README.md").read_text()) and "sparsify compile" in card
    found = json.loads(command(*words, "--overwrite", "--json").stdout)
    assert found["resumed"] == len(found["trials"]) and found["perplexity"] <= found["limit"]
    assert "it exists already" in command(*words).stderr


@pytest.mark.parametrize("spec", ["magnitude", "wanda"])
@pytest.mark.parametrize("calibration", [None, "the same"])
def test_the_folder_as_a_recipe_is_judged_by_the_text_of_the_search(
    spec: str, calibration: str | None, model: Path, text: Path, tmp_path: Path
) -> None:
    given = {} if calibration is None else {"calibration": str(text)}
    found = seek(model, text, spec, output=tmp_path / "out", **given)
    ran = command("compile", "--recipe", tmp_path / "out", "-o", tmp_path / "again")
    assert ran.returncode == 0 and same(tmp_path / "again", tmp_path / "out"), ran.stderr
    told = sparsify.diff(tmp_path / "out", tmp_path / "again")
    (ours,), (again,) = told.figures_a, told.figures_b
    assert (
        ours.windows == again.windows != ""
        and "do not compare" not in command("diff", tmp_path / "out", tmp_path / "again").stdout
    )
    assert again.before == pytest.approx(found.dense) and again.after == pytest.approx(found.perplexity)


def test_what_came_nearest_is_told_in_words_to_paste(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsify.searching.judge import Judge

    # Every trial is worse than the dense model, and better than the trial before it.
    falling = iter([2.0, *(3.0 - trial / 100 for trial in range(99))])
    monkeypatch.setattr(Judge, "perplexity", lambda *_: next(falling))
    with pytest.raises(CalibrationError, match=r"none of \d+ trials met it: nearest came") as told:
        seek(model, text, "magnitude:2:4", output=tmp_path / "out")
    words = re.search(r"nearest came (--pass.*) with 2\.\d+ \(1\.\d+ times", str(told.value))
    assert words is not None and "*" in words[1]
    assert shlex.join(shlex.split(words[1])) == words[1], "globs are quoted: the shell would put names of files there"


def test_who_stops_it_at_the_command_line_is_told_that_it_goes_on(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = Trials.keep

    def stop(self: Trials, trial: Trial) -> None:
        keep(self, trial)
        if len(self) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trials, "keep", stop)
    done = command(
        "search", model, "--pass", "magnitude", "--budget", "perplexity<=+0.2%", "--data", text, "--windows", 2,
        "--sequence-length", 32, "-o", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 130 and "the same command goes on from the trials in" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.search"]


def test_an_infinite_perplexity_is_a_trial_like_any(model: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that breaks the model is over the budget, and no reason to stop."""
    from sparsify.searching.judge import Judge

    whole = Judge.perplexity
    calls = iter(range(1000))
    monkeypatch.setattr(Judge, "perplexity", lambda self, w: math.inf if next(calls) % 3 == 1 else whole(self, w))
    monkeypatch.setattr(searching._Hunt, "check", lambda *_: 0.0)
    found = seek(model, text)
    assert any(math.isinf(trial.perplexity) for trial in found.trials) and found.perplexity <= found.limit


def test_trials_that_a_pass_refuses_are_over_the_budget(
    model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsify.searching.workbench import Workbench

    def refused(self: Workbench, own: Any, targets: Any, schedule: Any = None) -> Any:
        raise CalibrationError("the input of o_proj", found="nothing but zeros", do="Prune less")

    told: list[str] = []
    monkeypatch.setattr(Workbench, "prune", refused)
    with pytest.raises(CalibrationError, match=r"none of .* predicts anything: the input of o_proj: nothing but zeros"):
        seek(model, text, tell=told.append)
    assert "the input of o_proj: nothing but zeros. Prune less" in told[2]

    def no_memory(self: Workbench, own: Any, targets: Any, schedule: Any = None) -> Any:
        raise CalibrationError("pass wanda", found="too little memory", do="Buy some") from MemoryError()

    monkeypatch.setattr(Workbench, "prune", no_memory)
    with pytest.raises(CalibrationError, match="too little memory"):
        seek(model, text)


def test_a_pass_may_go_without_a_pattern() -> None:
    assert searching.parse_method("wanda") == parse_pass("wanda:50%")
    assert searching.parse_method("wanda,group=layer") == parse_pass("wanda:50%,group=layer")
    assert searching.parse_method("wanda:group=layer") == parse_pass("wanda:50%,group=layer")
    assert searching.parse_method("wanda:2:4") == parse_pass("wanda:2:4")
