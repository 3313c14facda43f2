"""The fuzzers end, count, and find nothing in a few trials of each kind: `make fuzz` runs them long, in CI too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["checkpoints", "packed", "json", "onnx", "words", "sealed", "poison"])
def test_a_few_trials(kind: str) -> None:
    words = [sys.executable, "tools/fuzz", kind, "--seed", "11", "--trials", "3", "--seconds", "300"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].split()[:2] == [kind, "3"]
