"""A command ends without taking its process apart, and nobody outside can tell but by the time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import atexit, sys
{before}
from sparsify.cli.ending import at_once

class Left:
    def __del__(self):
        print("taken apart")

left = Left()

def command():
    import threading, time

    atexit.register(print, "told at the end")
    threading.Thread(target=lambda: (time.sleep(0.2), print("a thread"))).start()
    print("x" * 100_000)
    {ends}

at_once(command)
"""
WORK = ["x" * 100_000, "a thread", "told at the end"]


def run(ends: str, before: str = "") -> subprocess.CompletedProcess[str]:
    code = CODE.format(ends=ends, before=before)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("ends", "code"),
    [("pass", 0), ("sys.exit()", 0), ("sys.exit(2)", 2), ("sys.exit('no')", 1), ("raise KeyError('gone')", 1)],
)
def test_all_that_was_registered_runs_and_the_code_is_pythons(ends: str, code: int) -> None:
    done = run(ends)
    assert done.returncode == code and done.stdout.splitlines() == WORK
    assert ("KeyError: 'gone'" in done.stderr) == ("KeyError" in ends) and ("no\n" in done.stderr) == ("'no'" in ends)


# A function that does not hold on to what the process made.
HOOK = "own = {}; exec('def hook(*_): pass', own); "


@pytest.mark.parametrize(
    "before",
    [f"{HOOK}sys.settrace(own['hook'])", f"{HOOK}sys.setprofile(own['hook'])", "atexit.register(print, 'first')"],
)
def test_who_watches_a_process_sees_its_end(before: str) -> None:
    done = run("pass", before)
    said = [line for line in done.stdout.splitlines() if line != "first"]
    assert done.returncode == 0 and said == [*WORK, "taken apart"]
    assert ("first" in done.stdout) == ("first" in before)


def test_output_that_cannot_be_written_is_told_as_python_tells_it() -> None:
    code = "from sparsify.cli.ending import at_once; at_once(lambda: print('lost'))"
    with Path("/dev/full").open("w") as full:
        # -I: PYTHONUNBUFFERED would have it fail at once.
        done = subprocess.run([sys.executable, "-I", "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 120 and "No space left" in done.stderr


def test_the_command_is_such_a_process() -> None:
    words = [sys.executable, "-X", "importtime", "-m", "sparsify", "passes"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and "sparsify.cli.ending" in done.stderr
