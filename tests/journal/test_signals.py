"""Processes that are ended from outside, in whatever way, leave what they had finished."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.families import deep
from support.interrupted import content

ROOT = Path(__file__).parents[2]
# Ctrl-C is what the other tests end their runs with.
SIGNALS = {signal.SIGKILL: -9, signal.SIGTERM: 143}

# The command line in children of one process, which has imported everything: OUT, a signal or 0, further words.
COMMANDS = """
import contextlib, json, os, sys, time
from pathlib import Path
import sparsify
from sparsify.cli.main import main
from sparsify.journal.left import left_of

WORDS = ["compile", "model", "--pass", "sparsegpt:2:4", "--calibration", "ids.safetensors", "--samples", "16"]

def run(out, number, *more):
    pid = os.fork()
    if pid == 0:
        with open(f"{out}.said", "w") as said:
            os.dup2(said.fileno(), 1), os.dup2(said.fileno(), 2)
        sys.argv = ["sparsify", *WORDS, "--sequence-length", "64", "-o", out, *more]
        code = 0
        try:
            main()
        except SystemExit as error:
            code = error.code or 0
        sys.stderr.flush()
        os._exit(code)
    while number and not any(left.finished >= 5 for left in left_of(Path(out))):
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.002)
    if number:
        os.kill(pid, number)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return [status, Path(f"{out}.said").read_text(), [(str(left.path), left.finished) for left in left_of(Path(out))]]

given = {"calibration": "ids.safetensors", "samples": 16, "sequence_length": 64}
sparsify.compile("model", "sparsegpt:2:4", output="whole/out", **given)
print("\\n" + json.dumps([run(*words) for words in json.loads(sys.argv[1])]))
"""


@pytest.mark.slow
def test_a_signal_once_some_parts_are_finished(tmp_path: Path) -> None:
    deep("llama", 3).save_pretrained(tmp_path / "model")
    save_file({"input_ids": torch.arange(4096) % 57 + 3}, tmp_path / "ids.safetensors")
    runs: list[list[object]] = []
    for number in SIGNALS:
        runs += [[f"{number:d}/out", number], [f"{number:d}/out", 0], [f"{number:d}/out", 0, "--resume"]]
    for out, *_ in runs:
        (tmp_path / str(out)).parent.mkdir(exist_ok=True)
    command = [sys.executable, "-c", COMMANDS, json.dumps(runs)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    others = json.loads(done.stdout.splitlines()[-1])
    for number, code in SIGNALS.items():
        (ended, told, ((path, finished),)), anew, resumed = others[:3]
        del others[:3]
        assert ended == code and 5 <= finished < 21
        if number != signal.SIGKILL:
            assert f"{finished} finished parts of this run are kept in {path}" in told and "nothing was written" in told
        assert anew[0] == 1 and f"this very job was interrupted: {finished} finished parts" in anew[1]
        assert resumed[0] == 0 and resumed[2] == [], resumed[1]
        place = tmp_path / f"{number:d}"
        assert content(place / "out") == content(tmp_path / "whole" / "out")
        assert sorted(path.name for path in place.iterdir()) == ["out", "out.said"]


@pytest.mark.exhaustive
def test_kills_at_random_moments() -> None:
    """A few; `python tools/kills --resume 20` has more."""
    environment: dict[str, Any] = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, ROOT / "tools" / "kills", "--resume", "6", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False, env=environment)
    assert done.returncode == 0 and "6 of 6" in done.stdout, done.stdout + done.stderr
