"""Tasks that cannot be asked: each refusal says what was asked, what was found, and what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.command_line import sparsify as command
from support.tasks import rows, speaker, task, written

import sparsify
from sparsify.errors import BackendError, CalibrationError, CheckpointError, SparsifyError, SpecError, TraceError
from sparsify.quality.tasks import names

ROWS = rows(4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speaker(tmp_path_factory.mktemp("speaker") / "dense")


@pytest.fixture(scope="module")
def quiz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return task(tmp_path_factory.mktemp("tasks"), "quiz", ROWS)


def test_an_unknown_task_and_one_whose_data_are_elsewhere(model: Path) -> None:
    """Both know all of lm-eval's tasks, which takes ten seconds once."""
    from sparsify.quality.tasks.chosen import named

    known = named([*names.SUITES, "mmlu"]).manager.task_index
    for name in names.SUITES["wanda7"]:
        assert "acc" in [metric["metric"] for metric in known[name].cfg["metric_list"]], name
    with pytest.raises(SpecError, match=r"task 'hellaswagg': nothing of that name .*hellaswag"):
        sparsify.evaluate(model, tasks="boolq,hellaswagg")
    with pytest.raises(SpecError, match=r"task 'wanda8': .*wanda7"):
        sparsify.evaluate(model, tasks=["wanda8"])
    # Tests reach for no network: what the data set is called, and where it would have come from.
    with pytest.raises(CalibrationError, match=r"task 'boolq': its data cannot be had .*super_glue.*huggingface\.co"):
        sparsify.evaluate(model, tasks="boolq")


def _gone(place: Path) -> dict[str, Any]:
    return {"dataset_kwargs": {"data_files": {"test": str(place / "none.json")}}}


def _split(place: Path) -> dict[str, Any]:
    return {"test_split": "validation"}


def _column(place: Path) -> dict[str, Any]:
    return {"doc_to_target": "{{answers.first}}"}


def _later(place: Path) -> dict[str, Any]:
    """The first document is as it should be."""
    return {"doc_to_text": "{{ 6 // (3 - 3 * (question != first)) }}".replace("first", repr(ROWS[0]["question"]))}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (_gone, r"its data cannot be had .*none\.json.*count from where the command runs"),
        (_split, "task '.*': it cannot be made of its data"),
        (_column, r"task '.*': it cannot be made of its data \('answers' is undefined\)"),
        (_later, "tasks .*spoilt.* for dense: ZeroDivisionError: "),
    ],
)
def test_tasks_that_do_not_fit_their_data(
    model: Path, tmp_path: Path, changes: Callable[[Path], dict[str, Any]], match: str
) -> None:
    path = task(tmp_path, "spoilt", ROWS, **changes(tmp_path))
    with pytest.raises(CalibrationError, match=match):
        sparsify.evaluate(model, tasks=path)


def test_more_examples_than_there_are(model: Path, quiz: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"task 'quiz' with 5 examples .*: 4 documents .*--num-fewshot 4 or fewer"):
        sparsify.evaluate(model, tasks=quiz, num_fewshot=5)
    own = task(tmp_path, "own", ROWS, fewshot_split="test")
    with pytest.raises(SpecError, match=r"4 documents to draw them from, the question among them.*--num-fewshot 3 or"):
        sparsify.evaluate(model, tasks=own, num_fewshot=4)
    assert sparsify.evaluate(model, tasks=own, num_fewshot=3).score("own", "acc").shots == 3


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("task: [", r"task .*own\.yaml: no task's YAML"),
        ("words: 3", r"task .*own\.yaml: neither a task nor a group in it"),
        ("include: none.yaml\ntask: own", r"task .*own\.yaml: no task's YAML"),
    ],
)
def test_files_that_are_no_tasks(model: Path, tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(SpecError, match=match):
        sparsify.evaluate(model, tasks=tmp_path / "own.yaml")


def test_places_that_are_none(model: Path, tmp_path: Path) -> None:
    for asked, match in (
        (tmp_path / "no.yaml", "no such file or folder"),
        (f"{tmp_path}/none", "no such file or folder"),
        (f"{tmp_path}", "no file that describes a task"),
        (" , ", "no name among them"),
        ([], "no name among them"),
    ):
        with pytest.raises(SpecError, match=match):
            sparsify.evaluate(model, tasks=asked)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"--include .*: no such folder"):
        sparsify.evaluate(model, tasks="quiz", include=tmp_path / "none")


def test_a_task_twice(model: Path, tmp_path: Path) -> None:
    task(tmp_path, "quiz", ROWS)
    written(tmp_path / "all.yaml", {"group": "all", "task": ["quiz"]})
    with pytest.raises(SpecError, match="task 'quiz': it is in 'quiz' once more"):
        sparsify.evaluate(model, tasks="all,quiz", include=tmp_path)


def test_a_task_that_runs_what_the_model_writes(model: Path, tmp_path: Path) -> None:
    path = task(tmp_path, "coding", ROWS, unsafe_code=True)
    with pytest.raises(SpecError, match=r"task 'coding': .*the code which the model writes.*confirm_run_unsafe_code"):
        sparsify.evaluate(model, tasks=path)


def test_lm_eval_is_missing(model: Path, quiz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "find_spec", lambda name: None)
    with pytest.raises(SpecError, match=r"lm-eval is not installed\. pip install 'sparsify-fx\[eval\]'"):
        sparsify.evaluate(model, tasks=quiz)
    monkeypatch.setattr(names, "find_spec", lambda name: None if name == "accelerate" else name)
    with pytest.raises(SpecError, match=r"accelerate is not installed\. pip install 'sparsify-fx\[eval\]'"):
        sparsify.evaluate(model, tasks=quiz)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "neither data nor tasks"),
        ({"num_fewshot": 2}, "--num-fewshot: no task"),
        ({"include": "."}, "--include: no task"),
        ({"tasks": "quiz", "num_fewshot": -1}, "--num-fewshot -1: fewer than 0"),
        ({"tasks": "quiz", "limit": 0}, "--limit 0: fewer than 1"),
        ({"tasks": "quiz", "batch_size": 0}, "--batch-size 0: fewer than 1"),
    ],
)
def test_words_that_do_not_fit(model: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(SpecError, match=match):
        sparsify.evaluate(model, **options)
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert command("eval", model, *words).returncode == 2


def test_models_that_answer_nothing(
    model: Path, quiz: Path, folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for family, match in (("vit", "ViTForImageClassification"), ("bert", "BertForMaskedLM")):
        with pytest.raises(TraceError, match=f"tasks for {family}: {match}, which predicts no text"):
            sparsify.evaluate(folder(family), tasks=quiz)
    import torch

    with pytest.raises(TraceError, match="tasks for sequential: Sequential, which predicts no text"):
        sparsify.evaluate(torch.nn.Sequential(torch.nn.Linear(2, 2)), tasks=quiz)
    shutil.copytree(model, tmp_path / "mute")
    for path in (tmp_path / "mute").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="a tokenizer for mute: no tokenizer files"):
        sparsify.evaluate(tmp_path / "mute", tasks=quiz)


@pytest.mark.slow
def test_an_onnx_folder_writes_no_text(model: Path, quiz: Path, folder: Callable[[str], Path], tmp_path: Path) -> None:
    sparsify.compile(model, to="onnx", output=tmp_path / "onnx")
    writing = task(
        tmp_path / "tasks", "writing", ROWS, output_type="generate_until", doc_to_choice=None,
        metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip
    with pytest.raises(BackendError, match=r"writing for onnx: .*an ONNX graph, of which likelihoods alone are taken"):
        sparsify.evaluate(tmp_path / "onnx", tasks=writing)
    for path in (tmp_path / "onnx").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="a tokenizer for onnx: no tokenizer files"):
        sparsify.evaluate(tmp_path / "onnx", tasks=quiz, check=False)
    sparsify.compile(folder("vit"), to="onnx", output=tmp_path / "vit")
    with pytest.raises(TraceError, match="tasks for vit: a graph of pixel_values, which predicts no text"):
        sparsify.evaluate(tmp_path / "vit", tasks=quiz)


def test_nothing_large_is_read_for_a_task_that_is_none(
    model: Path, quiz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any) -> Any:
        raise AssertionError("the weights were read")

    monkeypatch.setattr("sparsify.quality.tasks.answering.running_module", read)
    with pytest.raises(CalibrationError):
        sparsify.evaluate(model, tasks=task(quiz.parent, "spoilt", ROWS, test_split="none"))
    with pytest.raises(AssertionError, match="the weights were read"):
        sparsify.evaluate(model, tasks=quiz)


@pytest.mark.slow
def test_at_the_command_line(model: Path, quiz: Path, tmp_path: Path) -> None:
    sparsify.compile(model, "magnitude:75%", output=tmp_path / "out")
    done = command("eval", model, tmp_path / "out", "--tasks", quiz)
    assert done.returncode == 0, done.stderr
    assert "difference" in done.stdout and "quiz" in done.stdout and "perplexity" not in done.stdout
    said = json.loads(command("eval", model, tmp_path / "out", model, "--tasks", quiz, "--json").stdout)
    assert [len(row["scores"]) for row in said] == [2, 2, 2]
    assert said[2]["scores_against_the_first"][0]["verdict"] == "neither can be told from guessing (25.0%)"
    three = command("eval", model, tmp_path / "out", model, "--tasks", quiz)
    assert three.stdout.count("quiz") >= 2 and "model" in three.stdout
    text = tmp_path / "text.txt"
    text.write_text("a river and a stone " * 60)
    both = command("eval", model, "--tasks", quiz, "--data", text, "--sequence-length", 32, "--windows", 3)
    assert both.returncode == 0 and "perplexity on 3 windows" in both.stdout and "acc_norm" in both.stdout


@pytest.mark.slow
def test_lm_evals_own_command_line(model: Path, quiz: Path, tmp_path: Path) -> None:
    """As it is documented, in a process of its own; it reads all of its own tasks."""
    import os
    import subprocess
    import sys

    words = ["--model", "sparsify", "--tasks", str(quiz), "--model_args"]
    env = {**os.environ, "COLUMNS": "120"}
    run = [sys.executable, "-m", "sparsify.lm_eval", *words]
    done = subprocess.run([*run, f"pretrained={model}"], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    expected = sparsify.evaluate(model, tasks=quiz).score("quiz")
    (line,) = [line for line in done.stdout.splitlines() if "|acc " in line]
    assert float(line.split("|")[7]) == pytest.approx(expected.value, abs=1e-4)
    done = subprocess.run(
        [*run, f"pretrained={tmp_path / 'none'}"], capture_output=True, text=True, env=env, timeout=300
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: model ")


def test_errors_are_ours(model: Path, tmp_path: Path) -> None:
    """A task's own code may raise anything: here a template that is none."""
    path = task(tmp_path, "broken", ROWS, doc_to_text="{{question")
    with pytest.raises(SparsifyError):
        sparsify.evaluate(model, tasks=path)
    assert command("eval", model, "--tasks", path).returncode == 1
