"""Trials that are kept: found again, whole after a kill, never another question's."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from sparsify.errors import BackendError, CheckpointError
from sparsify.searching.trials import Trial, Trials, work_folder

QUESTION = {"model": "a", "pass": "wanda:50%"}


def trial(number: int, perplexity: float = 3.5) -> Trial:
    shares = {"o_proj": number / 200, "q/k/v_proj": 0.0}
    return Trial(number, "all kinds alike", shares, "wanda:50%", ("*.q_proj",), perplexity, number / 400, 1.25, "")


def filled(out: Path) -> Path:
    trials = Trials(QUESTION, out)
    for number in (1, 2, 3):
        trials.keep(trial(number, math.inf if number == 2 else 3.5))
    assert trials.path is not None and trials.resumed == 0
    return trials.path


def test_trials_are_found_again(tmp_path: Path) -> None:
    path = filled(tmp_path / "out")
    assert path.parent == work_folder(tmp_path / "out") == tmp_path / "out.search"
    again = Trials(QUESTION, tmp_path / "out")
    assert again.resumed == len(again) == 3
    for number in (1, 2, 3):
        assert again.find(trial(number).shares) == trial(number, math.inf if number == 2 else 3.5)
    assert again.find({"o_proj": 0.9, "q/k/v_proj": 0.0}) is None
    assert all(json.loads(line) for line in path.read_text().splitlines()), "JSON, infinity too"


def test_a_line_that_was_being_written_is_dropped(tmp_path: Path) -> None:
    path = filled(tmp_path / "out")
    whole = path.read_bytes()
    for cut in (1, 20, len(whole.splitlines()[-1])):
        path.write_bytes(whole[:-cut])
        again = Trials(QUESTION, tmp_path / "out")
        assert again.resumed == 2
        again.keep(trial(3))
        assert Trials(QUESTION, tmp_path / "out").resumed == 3 and path.read_bytes() == whole
    path.write_bytes(whole[:10])
    assert Trials(QUESTION, tmp_path / "out").resumed == 0


def test_another_question_begins_anew_beside_the_first(tmp_path: Path) -> None:
    filled(tmp_path / "out")
    other = Trials({**QUESTION, "model": "b"}, tmp_path / "out")
    assert other.resumed == 0
    other.keep(trial(1))
    assert len(list((tmp_path / "out.search").iterdir())) == 2
    assert Trials(QUESTION, tmp_path / "out").resumed == 3


@pytest.mark.parametrize(
    "line",
    ["{}", "[]", "7", "null", "no JSON", '{"number": 1}', '{"number": []}', "\ufffd" * 9, '{"shares": 3}', "[" * 10**5],
)
def test_a_broken_line_is_named(line: str, tmp_path: Path) -> None:
    path = filled(tmp_path / "out")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    with pytest.raises(CheckpointError, match="a line 3 that is no trial"):
        Trials(QUESTION, tmp_path / "out")


def test_a_file_of_another_question_under_this_name_is_refused(tmp_path: Path) -> None:
    path = filled(tmp_path / "out")
    path.write_text('{"question": {"model": "b"}}\n')
    with pytest.raises(CheckpointError, match="those of another question"):
        Trials(QUESTION, tmp_path / "out")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    path = filled(tmp_path / "out")
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match="no file of trials"):
        Trials(QUESTION, tmp_path / "out")
    (tmp_path / "other.search").write_text("a file in the place of the folder")
    with pytest.raises(BackendError, match="cannot be written"):
        Trials(QUESTION, tmp_path / "other").keep(trial(1))


def test_without_an_output_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trials = Trials(QUESTION, None)
    trials.keep(trial(1))
    assert trials.find(trial(1).shares) is not None and trials.path is None and not list(tmp_path.iterdir())
