"""What users of command lines expect: JSON, closed pipes, NO_COLOR, homes, near names, little time for help."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command_line import sparsify

from sparsify.cli.console import Terminal
from sparsify.cli.group import _MEANT
from sparsify.method.registry import registered
from sparsify.words import split_names


def test_a_compile_as_json(folder: Callable[[str], Path], tmp_path: Path) -> None:
    words = ("compile", folder("llama"), "--pass", "wanda:2:4", "--calibration", "random", "--sequence-length", 16)
    done = sparsify(*words, "--samples", 2, "-o", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    manifest = json.loads((tmp_path / "out" / "sparsify.json").read_text())
    assert (
        found["passes"] == manifest["passes"]
        and found["output"] == str(tmp_path / "out")
        and found["parameters"] == 22688
    )
    sites = found["passes"][0]["sites"]
    zeros = sum((1 - s["kept"]) * s["shape"][0] * s["shape"][1] for s in sites)
    assert found["kept"] == pytest.approx(1 - zeros / 22688) and not found["calibration"]["text"]
    two = sparsify(*words, "--json", "--print-after", "all", "-o", tmp_path / "other")
    assert two.returncode == 2 and "two things to print" in two.stderr


def test_the_whole_model_is_in_the_table(folder: Callable[[str], Path], tmp_path: Path) -> None:
    done = sparsify(
        "compile", folder("llama"), "--pass", "magnitude:2:4", "--only", "*down_proj", "-o", tmp_path / "out"
    )
    (row,) = [line for line in done.stdout.splitlines() if "whole model" in line]
    assert "22,688" in row and f"{1 - 2 * 32 * 64 / 2 / 22688:.2%}" in row


@pytest.mark.slow
def test_a_reader_that_leaves_does_not_fail_a_compile(folder: Callable[[str], Path], tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "sparsify",
        "compile",
        str(folder("llama")),
        "--pass",
        "magnitude:2:4",
        "-o",
        str(tmp_path / "o"),
    ]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.returncode == 0 and "error" not in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "o" / "sparsify.json").exists()
    # What fails still says so by its code.
    reading, writing = os.pipe()
    os.close(reading)
    assert subprocess.run(words, stdout=writing, stderr=writing).returncode == 1
    os.close(writing)


def test_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn() -> str:
        console = Terminal()
        console._force_terminal, console.file = True, io.StringIO()
        console._color_system = console._color_system or 1  # type: ignore[assignment]
        console.print("x", style="red")
        return str(console.file.getvalue())

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[" in drawn()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in drawn()


def test_homes_are_found(folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind = no shell expands them."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(folder("llama"))
    text = tmp_path / "t.txt"
    text.write_text("some words of text " * 60)
    done = sparsify("compile", "~/model", "--pass", "magnitude:2:4", "--output=~/out", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["output"] == str(tmp_path / "out"), done.stderr
    assert sparsify("inspect", "~/model", "--dot=~/g.dot").returncode == 0 and (tmp_path / "g.dot").exists()
    assert str(tmp_path / "none") in sparsify("verify", "~/none").stderr.replace("\n", "")
    assert sparsify("verify", "~/out").returncode == 0


def test_what_is_no_folder_of_any_kind(tmp_path: Path) -> None:
    for place, says in ((tmp_path / "none", "nothing there"), (tmp_path, "no config.json")):
        done = sparsify("verify", place)
        assert done.returncode == 1 and says in done.stderr and "ONNX model" not in done.stderr


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("prune", "Did you mean 'sparsify compile'"),
        ("quantize", "sparsify prunes"),
        ("benchmark", "'sparsify bench'"),
        ("comple", "Near names: compile, compare"),
        ("Evaluate", "'sparsify eval'"),
    ],
)
def test_near_names_across_commands(word: str, says: str) -> None:
    done = sparsify(word, "model")
    assert done.returncode == 2 and says in " ".join(done.stderr.split())


def test_what_is_meant_is_there() -> None:
    assert {meant.split()[0] for meant in _MEANT.values()} <= set(registered("sparsify.commands"))


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["a,b", "c"], ["a", "b", "c"]),
        (["re:x{1,2},y"], ["re:x{1,2},y"]),
        (["*.q, re:a,b", "z"], ["*.q", "re:a,b", "z"]),
        (["layers.[1,2].*,k"], ["layers.[1,2].*", "k"]),
        ([" , "], []),
    ],
)
def test_names_with_commas(given: list[str], names: list[str]) -> None:
    assert split_names(given) == names


def test_versions() -> None:
    found = json.loads(sparsify("version", "--json").stdout)
    assert sparsify("--version").stdout.strip() == found["sparsify-fx"] and {"python", "torch"} <= found.keys()
    assert f"torch {found['torch']}" in sparsify("version").stdout
    # Whatever distribution its modules came with.
    assert any(name.startswith("onnxruntime") for name in found)


BARE = """
import sys
import typer
from rich.console import Console
application = typer.Typer()
@application.command()
def only(name: str = typer.Option("", help="A name.")) -> None: ...
sys.argv = ["only", "--help"]
application()
"""


def cpu_seconds(*words: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.first(6)
@pytest.mark.slow
@pytest.mark.parametrize("command", ["", *sorted(registered("sparsify.commands"))])
def test_help_takes_little_time(command: str) -> None:
    """Beside the help of a program of one option, in turns: machines differ, and so do they from hour to hour."""
    ours, bare = zip(
        *((cpu_seconds("-m", "sparsify", *command.split(), "--help"), cpu_seconds("-c", BARE)) for _ in range(3)),
        strict=True,
    )
    # torch alone takes ten times as long.
    assert min(ours) < 2 * min(bare)


@pytest.mark.first(1)
@pytest.mark.parametrize(
    "words",
    [
        ["compile", "MODEL", "--pass", "magnitude:2:4", "-o", "OUT"],
        ["sensitivity", "MODEL", "--pass", "magnitude:2:4", "--data", "DATA"],
        pytest.param(
            ["search", "MODEL", "--pass", "magnitude", "--budget", "perplexity<=1.05", "--data", "DATA", "-o", "OUT"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_names_may_stand_with_commas_between(words: list[str], bundled: Path, tmp_path: Path) -> None:
    """Each is a name by itself: the one that matches nothing is the one that is told of."""
    known = {"MODEL": str(bundled), "OUT": str(tmp_path / "out"), "DATA": "python-stdlib"}
    done = sparsify(*(known.get(word, word) for word in words), "--only", "*.q_proj,*.nonsense", cwd=tmp_path)
    assert done.returncode == 2 and "*.nonsense" in done.stderr and "q_proj,*" not in done.stderr
    assert not (tmp_path / "out").exists()
