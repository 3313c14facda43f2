"""Processes that are ended from outside, in whatever way, leave what they had finished."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.families import deep
from support.interrupted import content, hidden

from sparsify.journal.left import left_of

ROOT = Path(__file__).parents[2]


def start(place: Path, out: str, *words: str) -> subprocess.Popen[str]:
    given = ["model", "--pass", "sparsegpt:2:4", "--calibration", "ids.safetensors", "--samples", "16"]
    return subprocess.Popen(
        [sys.executable, "-m", "sparsify", "compile", *given, "--sequence-length", "64", "-o", out, *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=place,
    )  # fmt: skip


def ended(process: subprocess.Popen[str], code: int = 0) -> str:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    return output + errors


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("signals")
    deep("llama", 6).save_pretrained(place / "model")
    save_file({"input_ids": torch.arange(4096) % 57 + 3}, place / "ids.safetensors")
    (place / "whole").mkdir()
    ended(start(place, "whole/out"))
    return place


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGKILL, -9, ""),
        (signal.SIGINT, 130, "interrupted; nothing was written"),
        pytest.param(signal.SIGTERM, 143, "terminated; nothing was written", marks=pytest.mark.slow),
    ],
)
def test_a_signal_once_some_parts_are_finished(place: Path, number: int, code: int, said: str) -> None:
    out = place / str(number) / "out"
    out.parent.mkdir()
    process = start(place, str(out))
    while process.poll() is None and not any(left.finished >= 5 for left in left_of(out)):
        time.sleep(0.002)
    process.send_signal(number)
    told = ended(process, code)
    (left,) = left_of(out)
    assert said in told and not out.exists() and 5 <= left.finished < 42 and not left.alive
    if said:
        assert f"{left.finished} finished parts of this run are kept in {left.path}" in told
        assert [path.name for path in out.parent.iterdir()] == [left.path.name]
    else:
        assert f"{left.finished} finished parts" in ended(start(place, str(out)), 1)
    ended(start(place, str(out), "--resume"))
    assert content(out) == content(place / "whole" / "out") and not hidden(out.parent)


@pytest.mark.slow
def test_kills_at_random_moments() -> None:
    """A few; `python tools/kills --resume 20` has more."""
    environment: dict[str, Any] = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, ROOT / "tools" / "kills", "--resume", "6", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False, env=environment)
    assert done.returncode == 0 and "6 of 6" in done.stdout, done.stdout + done.stderr
