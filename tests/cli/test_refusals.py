"""How commands end when something is wrong: one sentence, and the code that the documentation gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import typer
from support.command_line import sparsify
from support.families import save

from sparsify.cli.options import command_errors
from sparsify.errors import CheckpointError, SparsifyError, SpecError


def words(text: str) -> str:
    return " ".join(text.split())


def test_words_that_contradict_each_other(folder: Callable[[str], Path]) -> None:
    model = folder("llama")
    for command, says in (
        (("compile", model, "--pass", "magnitude:2:4", "--dry-run", "--print-after", "all"), "a dry run runs no pass"),
        (("inspect", model, "--graph", "--json"), "another form beside it"),
        (("inspect", model, "--graph", "--dimensions"), "Give --graph alone"),
        (("compile", model, "--pass", "magnitude:2:4", "--print-after", "wanda", "-o", "x"), "no such pass"),
    ):
        done = sparsify(*command)
        assert done.returncode == 2 and says in words(done.stderr), command
    assert sparsify().returncode in (0, 2)
    version = sparsify("--version")
    assert version.returncode == 0 and version.stdout[0].isdigit()


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (("compile", "M", "--pass", "wanda:2:4", "--to", "packed", "--to", "onnx"), "--to"),
        (("compile", "M", "-o", "A", "--pass", "wanda:2:4", "--output=B"), "--output"),
        (("compare", "M", "--samples", "3", "--samples=3"), "--samples"),
        (("tune", "--seed", "1", "M", "--seed", "2"), "--seed"),
    ],
)
def test_an_option_of_one_value_is_given_once(command: tuple[str, ...], option: str) -> None:
    """The last would be taken, and the others passed over in silence."""
    done = sparsify(*command)
    assert done.returncode == 2 and f"{option} is given more than once" in words(done.stderr)
    assert f"sparsify {command[0]}" in words(done.stderr)


def test_options_that_add_up_are_given_as_often_as_wanted(folder: Callable[[str], Path]) -> None:
    names = ("--only", "*q_proj*", "--only", "*k_proj*", "--quiet", "--quiet")
    done = sparsify("compile", folder("llama"), "--pass", "magnitude:2:4", "--dry-run", *names)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (SpecError("a", found="b", do="C"), 2, "a: b. C"),
        (CheckpointError("a", found="b", do="C"), 1, "a: b. C"),
        (KeyboardInterrupt(), 130, "interrupted; nothing was written"),
        (ZeroDivisionError("x\nand more"), 1, "unexpected ZeroDivisionError: x (run again with --debug"),
        (SystemExit(7), 7, ""),
        (BrokenPipeError(), None, ""),
        (typer.Exit(3), None, ""),
    ],
)
def test_exit_codes(error: BaseException, code: int | None, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BaseException) as caught, command_errors(False, "error"):
        raise error
    if code is None:
        assert caught.value is error
    else:
        assert isinstance(caught.value, SystemExit) and caught.value.code == code
    assert says in words(capsys.readouterr().err)


@pytest.mark.parametrize("error", [SpecError("a", found="b", do="C"), ZeroDivisionError("x")])
def test_with_debug_the_error_comes_as_it_is(error: Exception) -> None:
    with pytest.raises((SparsifyError, ZeroDivisionError)) as caught, command_errors(True, "error"):
        raise error
    assert caught.value is error


def test_a_second_model_that_is_not_there_is_told_before_the_first_is_measured(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words and more of them. " * 400)
    with patch("sparsify.evaluation.evaluate.evaluate", side_effect=AssertionError("measured")):
        done = sparsify("eval", save("llama", tmp_path / "dense"), tmp_path / "slip", "--data", text)
    assert done.returncode == 1 and "slip: no such folder" in done.stderr, done.stderr


def test_a_teacher_that_is_not_there_is_told_before_calibration_is_drawn(tmp_path: Path) -> None:
    words = ["--pass", "refine", "--teacher", tmp_path / "slip", "--calibration", "random", "-o", tmp_path / "out"]
    with patch("sparsify.compiler.stages.load_calibration", side_effect=AssertionError("drawn")):
        done = sparsify("compile", save("llama", tmp_path / "dense"), *words)
    assert done.returncode == 1 and "slip: no such folder" in done.stderr, done.stderr
