"""The command line as a user meets it: most commands in this process, some in one of their own."""

from __future__ import annotations

import inspect
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command_line import process, sparsify

from sparsify.cli.main import application
from sparsify.files.checkpoint import Checkpoint


@pytest.mark.parametrize("words", ["--help", "compile --help", "--version"])
def test_help_imports_nothing_heavy(words: str) -> None:
    """rich is for tables, pydantic (typer's) for values: help has neither, and they take half of its time."""
    code = (
        "import sys, sparsify.cli.main as c\n"
        f"try: c.application()({words.split()})\n"
        "except SystemExit: pass\n"
        "print(*[name for name in ('torch', 'numpy', 'rich', 'pydantic') if name in sys.modules], 'loaded')"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.count("\n") >= 2 and said.splitlines()[-1].strip() == "loaded"


def test_the_main_job(bundled: Path, tmp_path: Path) -> None:
    """In a process of its own, as a user runs it; what comes after in this one."""
    done = process(
        "compile",
        bundled,
        "--pass",
        "wanda:2:4",
        "--calibration",
        "python-stdlib",
        "--samples",
        4,
        "--sequence-length",
        64,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    out = tmp_path / "pycode-6m-wanda-2-4"
    assert f"wrote {out}" in done.stdout.replace("\n", "")
    assert "50.00%" in done.stdout and "python-stdlib (calibration half)" in done.stdout
    # A file in place of a terminal: a line for each phase, and nothing else.
    phases = [re.match(r"([a-z ]+?)( [a-z]* ?\d+/\d+)?: \d+:\d\d elapsed, ", line) for line in done.stderr.splitlines()]
    assert [found[1] if found else None for found in phases][:3] == ["loading", "tracing", "reading data"]
    assert all(phases) and "\r" not in done.stderr
    manifest = json.loads((out / "sparsify.json").read_text())
    assert manifest["passes"][0]["spec"] == "wanda:2:4"
    again = sparsify("compile", bundled, "--pass", "wanda:2:4", "--calibration", "random", cwd=tmp_path)
    assert again.returncode == 1 and "--overwrite" in again.stderr
    evaluated = sparsify("eval", out, "--data", "python-stdlib", "--sequence-length", 64, "--windows", 4, "--json")
    assert json.loads(evaluated.stdout)["windows"] == 4
    held = tmp_path / "held.txt"
    held.write_text("import os\nprint(os.getcwd())\n" * 60)
    both = sparsify("eval", bundled, out, "--data", held, "--sequence-length", 64, "--windows", 4).stdout
    assert "1.000×" in both and "pycode-6m" in both and both.count("×") == 2


def test_the_defaults_need_nothing_but_a_model_and_a_pass(folder: Callable[[str], Path], tmp_path: Path) -> None:
    done = sparsify("compile", folder("llama"), "--pass", "wanda:2:4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "self (sampled from the model" in done.stdout
    assert (tmp_path / "llama-wanda-2-4" / "sparsify.json").exists()


def test_dry_run_and_quiet(folder: Callable[[str], Path], tmp_path: Path) -> None:
    done = sparsify("compile", folder("opt"), "--pass", "wanda:4:8", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0 and "would prune" in done.stdout and "shared with the embedding" in done.stdout
    assert not list(tmp_path.iterdir())
    quiet = sparsify("compile", folder("opt"), "--pass", "magnitude:2:4", "-q", "-o", tmp_path / "out")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    checked = sparsify("verify", tmp_path / "out", "-q")
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
    weights = next((tmp_path / "out").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-2] + b"\0\x40")
    checked = sparsify("verify", tmp_path / "out", "-q")
    assert checked.returncode == 1 and checked.stdout  # what is wrong is said, quiet or not


def test_whatever_shows_progress_can_be_quiet() -> None:
    commands = [(c.name or c.callback.__name__, inspect.unwrap(c.callback)) for c in application().registered_commands]
    shown = {name for name, command in commands if "ProgressLine(" in inspect.getsource(command)}
    quiet = {name for name, command in commands if "quiet" in inspect.signature(command).parameters}
    assert {"verify", "unpack", "expand", "bench", "tune"} <= shown <= quiet


def test_inspect(folder: Callable[[str], Path], tmp_path: Path) -> None:
    said = sparsify("inspect", folder("llama"), "--dot", tmp_path / "g.dot").stdout
    assert "q_proj, k_proj, v_proj of model.layers.0.self_attn read" in said
    assert "32 output neurons × 32 inputs" in said
    assert (tmp_path / "g.dot").read_text().startswith("digraph")
    assert sparsify("inspect", folder("llama"), "--dot", tmp_path / "g.dot").returncode == 0, "an older one goes"
    (mine := tmp_path / "mine.txt").write_text("mine")
    done = sparsify("inspect", folder("llama"), "--dot", mine)
    assert done.returncode == 1 and "did not write" in done.stderr and mine.read_text() == "mine"
    found = json.loads(sparsify("inspect", folder("mixtral"), "--json").stdout)
    assert any(s["experts"] == 4 and len(s["tensors"]) == 8 for s in found["sites"])


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["compile", "{llama}", "--pass", "wnda:2:4"], 2, "Near names: wanda"),
        (["compile", "{llama}"], 2, "--pass wanda:2:4"),
        (["compile", "{llama}", "--pass", "wanda:2of4"], 2, "N:M"),
        (["compile", "{llama}", "--pass", "wanda:3:7", "--calibration", "random"], 2, "not a multiple of 7"),
        (["compile", "{llama}", "--pass", "wanda:2:4", "--ignore", "lm_heda"], 2, "lm_head"),
        (["compile", "{llama}", "--pass", "wanda:2:4", "--to", "onxx"], 2, "backend 'onxx'"),
        (["compile", "{llama}", "--pass", "wanda:2:4", "--calibration", "none.txt"], 1, "no such file"),
        (["compile", "no/such/model", "--pass", "wanda:2:4"], 1, "no such folder"),
        (["compile", "nobody/nothing", "--pass", "wanda:2:4"], 1, "the hub did not give it"),
        (["compile", "{llama}", "--pass", "wanda:2:4", "--frobnicate"], 2, "frobnicate"),
        (["compile", "{llama}", "--pass", "wanda:2:4", "--log-level", "loud"], 2, "no such level"),
        (["eval", "{bert}", "--data", "python-stdlib"], 1, "tokenizer"),
        (["inspect", "{llama}/config.json"], 1, "a file"),
    ],
)
def test_errors_are_sentences_with_the_right_exit_code(
    words: list[str], code: int, says: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    done = sparsify(*(w.format(llama=folder("llama"), bert=folder("bert")) for w in words), cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert says in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_debug_shows_the_traceback() -> None:
    done = process("inspect", "/no/such", "--debug")
    assert done.returncode == 1 and "Traceback" in done.stderr and "CheckpointError" in done.stderr


@pytest.mark.first(1)
@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [signal.SIGINT, *(pytest.param(how, marks=pytest.mark.slow) for how in (signal.SIGTERM, signal.SIGKILL))]
)
def test_a_killed_run_leaves_no_output_and_the_source_untouched(
    how: signal.Signals, bundled: Path, tmp_path: Path
) -> None:
    before = {p.name: p.read_bytes() for p in bundled.iterdir()}
    out = tmp_path / "out"
    child = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "sparsify",
            "compile",
            str(bundled),
            "--pass",
            "wanda:2:4",
            "--calibration",
            "random",
            "--samples",
            "512",
            "--sequence-length",
            "512",
            "-o",
            str(out),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A background job of a script ignores Ctrl-C, and its children after it; a user's command does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not any(p.suffix == ".safetensors" for p in tmp_path.glob("*/*")):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.2)
    child.send_signal(how)
    _, said = child.communicate()
    assert child.returncode not in (0, 2) and not out.exists()
    assert how == signal.SIGKILL or "; nothing was written" in said
    assert {p.name: p.read_bytes() for p in bundled.iterdir()} == before
    if how == signal.SIGKILL:
        # What the dead process left is hidden, and the next run removes it, but for a journal of another job.
        assert all(p.name.startswith(".") for p in tmp_path.iterdir())
        done = sparsify("compile", bundled, "--pass", "magnitude:2:4", "-o", out)
        assert done.returncode == 0
        assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".out.unfinished-")] == ["out"]
        assert set(Checkpoint(out).names()) == set(Checkpoint(bundled).names())
    else:
        assert not list(tmp_path.iterdir()) and "Traceback" not in said
