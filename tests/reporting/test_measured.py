"""What ``sparsify eval --json`` printed, on the page of the folder that it is of, and of no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.command_line import sparsify as command
from support.tasks import rows, speaker, task

import sparsify
from sparsify.errors import CheckpointError
from sparsify.files.manifest import digest_of_manifest, read_manifest

from .test_report import EVIL, Shown, everywhere, shown

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, what was pruned of it, text, and what the command said of both on that and a task."""
    root = tmp_path_factory.mktemp("measured")
    dense = speaker(root / "dense")
    sparsify.compile(dense, "magnitude:75%", output=root / "out")
    (root / "text.txt").write_text("\n\n".join(f"The {n} of rivers is {n * 7}." for n in range(200)))
    quiz = task(root / "tasks", "quiz", rows())
    words = ["--data", root / "text.txt", "--sequence-length", 32, "--windows", 4, "--tasks", quiz, "--json"]
    done = command("eval", dense, root / "out", *words)
    assert done.returncode == 0, done.stderr
    (root / "said.json").write_text(done.stdout)
    return root


def test_figures_of_both_models_stand_on_the_page(here: Path, tmp_path: Path) -> None:
    first, said = json.loads((here / "said.json").read_text())
    assert first["manifest"] is None, "of a folder that is not ours"
    assert said["manifest"] == digest_of_manifest(read_manifest(here / "out"))
    page = shown(here / "out", tmp_path / "page.html", evaluation=here / "said.json")
    assert "was not measured" in shown(here / "out", tmp_path / "bare.html").text
    assert "was not measured" not in page.text
    for row in (first, said):
        assert f"{row['perplexity']:,.2f}" in page.text
        for score in row["scores"]:
            assert f"{100 * score['value']:.2f}% ± {100 * score['standard_error']:.2f}" in page.text
    pairs = {pair["metric"]: pair for pair in said["scores_against_the_first"]}
    assert "quiz, acc, went from" in page.text and f"{pairs['acc']['verdict']}." in page.text
    assert said["against_the_first"]["verdict"].partition(";")[0] in page.text
    assert str(here / "dense") in page.text


def test_the_command_takes_several_and_a_model_alone(here: Path, tmp_path: Path) -> None:
    done = command("eval", here / "out", "--tasks", here / "tasks" / "quiz.yaml", "--limit", 5, "--json")
    assert done.returncode == 0, done.stderr
    (tmp_path / "alone.json").write_text(done.stdout)
    words = ["--eval", tmp_path / "alone.json", "--eval", here / "said.json", "-o", tmp_path / "page.html"]
    done = command("report", here / "out", *words)
    assert done.returncode == 0, done.stderr
    page = Shown((tmp_path / "page.html").read_text())
    assert page.text.count("± one standard error.") == 2 and "No other model was measured beside it." in page.text


def of_another_folder(said: Any) -> None:
    said[1]["manifest"] = "0" * 64


def unchecked(said: Any) -> None:
    said[1]["manifest"] = None


def a_text_for_a_number(said: Any) -> None:
    said[1]["scores"][0]["n"] = "many"


def no_task(said: Any) -> None:
    del said[1]["scores"][0]["task"]


def nothing_measured(said: Any) -> None:
    for row in said:
        for key in ("scores", "perplexity"):
            row.pop(key)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (of_another_folder, "none is this folder as it is now"),
        (unchecked, "none is this folder as it is now"),
        (a_text_for_a_number, r"\[1\].scores\[0\].n is 'many'"),
        (no_task, r"\[1\].scores\[0\].task is missing"),
        (nothing_measured, "neither perplexities nor scores"),
    ],
)
def test_what_is_not_of_this_folder_is_refused(here: Path, tmp_path: Path, change: Any, found: str) -> None:
    said = json.loads((here / "said.json").read_text())
    change(said)
    (tmp_path / "said.json").write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match=found):
        sparsify.report(here / "out", tmp_path / "page.html", evaluation=tmp_path / "said.json")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("text", ["", "[1", "3", '"words"', "[[]]", "null"])
def test_files_that_are_no_evaluation_are_refused(here: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "said.json").write_text(text)
    done = command("report", here / "out", "--eval", tmp_path / "said.json", "-o", tmp_path / "page.html")
    assert done.returncode == 1 and "evaluation" in done.stderr and "Traceback" not in done.stderr, done.stderr
    done = command("report", here / "out", "--eval", tmp_path / "nowhere.json", "-o", tmp_path / "page.html")
    assert done.returncode == 1 and "nowhere.json" in done.stderr


def test_a_folder_that_was_made_anew_is_another(here: Path, tmp_path: Path) -> None:
    sparsify.compile(here / "dense", "magnitude:80%", output=tmp_path / "out")
    with pytest.raises(CheckpointError, match="none is this folder as it is now"):
        sparsify.report(tmp_path / "out", tmp_path / "page.html", evaluation=[here / "said.json"])


def test_texts_in_it_are_text(here: Path, tmp_path: Path) -> None:
    said = json.loads((here / "said.json").read_text())
    evil = everywhere(said)
    for row, own in zip(evil, said, strict=True):
        row["manifest"] = own["manifest"]
    (tmp_path / "evil.json").write_text(json.dumps(evil))
    page = shown(here / "out", tmp_path / "page.html", evaluation=tmp_path / "evil.json")
    assert not {"script", "img"} & {tag for tag, _ in page.elements}
    assert EVIL.partition("(")[0] in page.text
