"""Folders as their users meet them: written at the command line or from Python, and loaded by transformers."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import transformers
from support.families import save
from typer.testing import CliRunner

import sparsify
from sparsify.backends.packed.backend import PackedBackend
from sparsify.cli.main import application

SMALLEST = PackedBackend(choice="smallest")


def command(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sparsify", *map(str, words)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "COLUMNS": "120"},
    )  # fmt: skip


def command_here(*words: object) -> subprocess.CompletedProcess[str]:
    """The same in this process, which has imported torch already; what a command sets for its process is undone."""
    given = [str(word) for word in words]
    before, terminated = dict(os.environ), signal.getsignal(signal.SIGTERM)
    loggers = [logging.getLogger(name) for name in (None, *logging.root.manager.loggerDict)]
    levels = [logger.level for logger in loggers]
    try:
        done = CliRunner().invoke(application(), given, env={"COLUMNS": "120"}, prog_name="sparsify")
    finally:
        os.environ.clear()
        os.environ.update(before)
        signal.signal(signal.SIGTERM, terminated)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return subprocess.CompletedProcess(given, done.exit_code, done.stdout, done.stderr)


def load(folder: Path, **options: Any) -> Any:
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder, **options).eval()


def write_both(family: str, folder: Path, spec: str = "magnitude:2:4", **options: Any) -> tuple[Path, Path]:
    """The pruned model as an ordinary folder and as a packed one."""
    save(family, folder / "dense", **options)
    sparsify.compile(folder / "dense", [spec], output=folder / "hf")
    sparsify.compile(folder / "dense", [spec], output=folder / "packed", to=SMALLEST)
    return folder / "hf", folder / "packed"


def same_files(one: Path, other: Path) -> bool:
    names = sorted(p.name for p in one.iterdir() if "safetensors" in p.name)
    return names == sorted(p.name for p in other.iterdir() if "safetensors" in p.name) and all(
        (one / n).read_bytes() == (other / n).read_bytes() for n in names if n.endswith(".safetensors")
    )
