"""``--processes`` as a user types it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.command_line import process, sparsify
from support.interrupted import content, hidden

from sparsify.journal.left import LINES

MODEL = "models/pycode-6m"
WORDS = ["--calibration", "python-stdlib", "--samples", 32, "--sequence-length", 128]


@pytest.fixture
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.slow
def test_two_processes_write_what_one_does(tmp_path, one_thread, monkeypatch):
    # Set, it asks for the same bytes twice, and no times are written.
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    words = ["compile", MODEL, "--pass", "wanda:2:4", *WORDS]
    two = process(*words, "-o", tmp_path / "two", "--processes", 2)
    assert two.returncode == 0, two.stderr
    # One of them speaks.
    assert two.stdout.count("wrote ") == 1
    told = json.loads((tmp_path / "two/sparsify.json").read_text())["processes"]
    assert told["count"] == 2 == len(told["ranks"]) and told["bytes"] == sum(own["sent"] for own in told["ranks"])
    assert all(own["worked"] > 0 and own["waited"] > 0 and own["sent"] > 0 for own in told["ranks"])
    assert told["tokens_per_second"] > 0
    # Masks take a bit a weight; norms and words are little beside them.
    assert told["bytes"] < 5_000_000
    assert "2 processes worked" in two.stdout and "tokens/s in all" in two.stdout
    one = process(*words, "-o", tmp_path / "one")
    assert one.returncode == 0, one.stderr
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.slow
def test_a_refusal_is_said_once(tmp_path):
    passes = ["--pass", "wanda:2:4", "--pass", "refine:batch=1"]
    done = process("compile", MODEL, *passes, *WORDS, "-o", tmp_path / "out", "--processes=2")
    assert done.returncode == 1
    assert done.stderr.count("pass refine by 2 processes") == 1
    assert "process 1 of 2 ended; process 0 says why" in done.stderr
    assert not list(tmp_path.iterdir())


def test_processes_of_processes_are_refused(monkeypatch, tmp_path):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    done = sparsify("compile", MODEL, "--pass", "wanda:2:4", "-o", tmp_path / "out", "--processes", 2)
    assert done.returncode == 2 and "torchrun has started already" in done.stderr


def test_one_process_is_no_number_of_them(tmp_path):
    done = sparsify("compile", MODEL, "--pass", "wanda:2:4", "-o", tmp_path / "out", "--processes", 1)
    assert done.returncode == 2 and "--processes" in done.stderr


# To layers of different widths.
SMALLER = ["llm-pruner:25%,scope=global,round=4,steps=2", "wanda:2:4"]


@pytest.mark.first(1)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("passes", "more", "finished"),
    [
        (["wanda:2:4"], ["--checkpoint-every", 1], 3),
        (["sparsegpt:2:4"], ["--checkpoint-every", 1], 10),
        # After the first of two rounds, and among the weights of the smaller model.
        (SMALLER, [], 1),
        (["llm-pruner:25%,round=4", "wanda:2:4"], ["--to", "packed:layout=packed24,choice=smallest"], 4),
        (["wanda:2:4"], ["--to", "onnx:weights=packed"], 3),
        (["wanda:2:4"], [], 3),
    ],
)
def test_a_killed_job_goes_on_to_the_same_bytes(passes, more, finished, tmp_path, one_thread):
    chosen = [word for spec in passes for word in ("--pass", spec)]
    words = ["compile", MODEL, *chosen, *more, *WORDS, "--processes", 2]
    whole = process(*words, "-o", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    out = tmp_path / "out"
    typed = [sys.executable, "-m", "sparsify", *map(str, [*words, "-o", out])]
    running = subprocess.Popen(typed, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 600
    # Until some parts are finished, which are what it goes on from.
    while sum(len(lines.read_bytes().splitlines()) for lines in tmp_path.glob(f".out.*/{LINES}")) < finished:
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.05)
    os.kill(_processes_of(running.pid)[1], signal.SIGKILL)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 1 and "process 1 of 2: it was ended by SIGKILL" in said
    assert not out.exists()
    assert hidden(tmp_path)
    resumed = process(*words, "-o", out, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    ours, theirs = content(out), content(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    # What the manifest says of bytes that were sent, and its digest in the card, are another run's.
    assert [name for name in theirs if ours[name] != theirs[name] and not name.endswith((".json", ".md"))] == []
    assert not hidden(tmp_path)


def _processes_of(launcher):
    """Those it started, in their order."""
    pids = [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]
    assert len(pids) == 2
    return pids
