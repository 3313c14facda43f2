"""One command of ours in a process of its own, with bounds, and how it ended."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# What a command may take more than it did before it began, and how long it may run.
MEMORY = 2 << 30
SECONDS = 60.0
# A file of a sparse terabyte costs nothing until somebody copies it.
FILE_BYTES = 1 << 30

WELL, REFUSED = "well", "refused"
# What must not be: another library's error, a signal, no end, something left behind, a control
# character printed, a change of sealed bytes that nothing noticed.
FAULTS = ("foreign", "crash", "hang", "left", "raw", "accepted")


@dataclass(frozen=True)
class Outcome:
    """``kind``: ``well``, ``refused`` (one of our errors, or wrong words), or one of ``FAULTS``."""

    kind: str
    text: str = ""


def attempt(words: Sequence[str], said: Path, seconds: float = SECONDS) -> Outcome:
    """Run ``sparsify WORDS`` in a fork of this process.

    Args:
        said: a file that takes what it prints.
    """
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        os.close(receive)
        _bounded()
        _redirected(said)
        outcome = _command(words)
        os.write(send, json.dumps([outcome.kind, outcome.text[-4000:]]).encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        deadline = time.monotonic() + seconds
        ready = select.select([pipe], [], [], seconds)[0]
        answer = pipe.read() if ready else b""
    if not ready or not _ended(child, deadline + 5):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return Outcome("hang", f"not done after {seconds:.0f} s")
    if not answer:
        return Outcome("crash", _last_words(said))
    kind, text = json.loads(answer)
    return Outcome(kind, text)


def printed_raw(said: Path) -> str | None:
    """The first line of what was printed that holds a control character, or None."""
    text = said.read_bytes().decode("utf-8", "replace").replace("\t", " ")
    return next((line for line in text.split("\n") if not line.isprintable() and _controls(line)), None)


def _controls(line: str) -> bool:
    return any(ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0 for c in line)


def _command(words: Sequence[str]) -> Outcome:
    from sparsify.cli.main import application
    from sparsify.cli.terminal import complain, patient_streams
    from sparsify.errors import SparsifyError

    patient_streams()
    debug = [] if not words or words[0] == "passes" else ["--debug"]
    try:
        application()([*words, *debug], standalone_mode=False)
    except SparsifyError as error:
        complain(str(error))
        return Outcome(REFUSED, str(error))
    except SystemExit as error:
        return Outcome(WELL if not error.code else REFUSED, f"exit {error.code}")
    except BaseException as error:
        if hasattr(error, "format_message"):  # wrong words
            return Outcome(REFUSED, str(error.format_message()))
        return Outcome("foreign", traceback.format_exc())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return Outcome(WELL)


def _bounded() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _redirected(said: Path) -> None:
    to = os.open(said, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(to, 1)
    os.dup2(to, 2)
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: PTH123, SIM115 (for the rest of this process)


def _ended(child: int, deadline: float) -> bool:
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        time.sleep(0.01)
    return False


def _last_words(said: Path) -> str:
    return said.read_bytes()[-2000:].decode("utf-8", "replace") if said.exists() else ""
