"""The command line as its users meet it, in this process: a process of its own takes five seconds to import torch."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from typer.testing import CliRunner

from sparsify.cli.main import application

WIDE = {"COLUMNS": "120"}


@dataclass(frozen=True)
class Done:
    """What a command left, as a finished process says it."""

    returncode: int
    stdout: str
    stderr: str


def sparsify(*words: object, cwd: Path | None = None) -> Done:
    """``sparsify WORDS`` in this process; what a command sets for its whole process is set back."""
    with _elsewhere(cwd), _settings_kept():
        result = CliRunner().invoke(application(), [*map(str, words)], env=WIDE, prog_name="sparsify")
    # Whatever is no exit is a traceback in a user's terminal.
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Done(result.exit_code, result.stdout, result.stderr)


def process(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """``sparsify WORDS`` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "sparsify", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **WIDE},
        timeout=300,
        check=False,
    )


@contextlib.contextmanager
def _elsewhere(folder: Path | None) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder or before)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _settings_kept() -> Iterator[None]:
    handler, environment, threads = signal.getsignal(signal.SIGTERM), dict(os.environ), torch.get_num_threads()
    loggers = [logging.getLogger(name) for name in (None, *logging.root.manager.loggerDict)]
    levels = [logger.level for logger in loggers]
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(threads)
        for logger, level in zip(loggers, levels, strict=True):
            if logger.level != level:  # setting one has every logger there is forget what it knows
                logger.setLevel(level)
