"""Command lines of random words: every command with options of its own and others', and values of no sense."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import typer.main

from sparsify.cli.main import application

_VALUES = (
    "", "0", "1", "2", "-1", "9" * 30, "1e400", "nan", "inf", "-0.5", "0.5", "a", "[b]", "[/b]", "a[/b]", "model[v1]",
    "\x1b[31mred", "\udcff", "x" * 300, "..", ".", "/", "~", "~nobody/x", "/dev/null", "/proc/self/mem", "a\nb", "é",
    "wanda:2:4", "wanda:120%", "wanda:0%", "wanda:2:4,group=x", "wanda:50%,group=layer", "wanda:" + "9" * 5000,
    "nosuch", "magnitude:99999999999:999999999999",
    "sparsegpt:50%,blocksize=0", "alps:2:4,iterations=-1", "re:(", "re:.*", "*",
    "layer", "block", "dense", "hf", "packed", "cuda", "onnx:weights=none", "onnx:opset=99", "auto", "cpu", "cuda:7",
    "8GiB", "-8GiB", "1e999GiB", "random", "self", "c4", "python-stdlib", "debug", "none.txt", ":", ",", "=", "--", "%",
)  # fmt: skip
_NUMBERS = ("--samples", "--windows", "--sequence-length", "--tokens")
# These would measure, train or compile kernels for minutes.
_SLOW = {"bench", "tune"}


def spoilt_words(random: Random, sound: Path, work: Path) -> Sequence[str]:
    """A command with a model that is there, mostly, and options with values that make sense at times."""
    commands = _commands()
    name = random.choice([c for c in sorted(commands) if c not in _SLOW])
    words = [name]
    paths = [str(p) for p in sorted(sound.iterdir())]
    base = {
        "compile": ["--pass", "magnitude:2:4", "-o", str(work / "out")],
        "compare": ["--passes", "magnitude:2:4", "--calibration", "random", "--samples", "2", "--sequence-length", "8"],
        "eval": ["--data", str(sound / "text.txt"), "--windows", "2", "--sequence-length", "8"],
        "run": ["w1"],
        "unpack": ["-o", str(work / "out")],
        "expand": ["-o", str(work / "out")],
    }.get(name, [])
    if random.random() < 0.95:
        words.append(random.choice(paths) if random.random() < 0.9 else random.choice(_VALUES))
    if random.random() < 0.8:
        words += base
    for _ in range(random.choice((0, 1, 1, 2, 4))):
        option = random.choice(commands[name] or ["--help"])
        # In place of OUT nothing that is outside the folder for it.
        if option in ("--output", "-o", "--dot"):
            words += [option, str(work / f"out{random.choice(_VALUES)}".replace("\0", ""))]
        elif option in (
            "--trust-remote-code",
            "--help",
            "-h",
            "--debug",
            "--samples",
            "--windows",
            "--sequence-length",
        ):
            words += [option, random.choice(("0", "-1", "3", "9" * 30, "x"))] if "-" in option[2:] else [option]
        else:
            words += [option, *([random.choice(_VALUES)] if random.random() < 0.9 else [])]
    if random.random() < 0.1:
        random.shuffle(words)
    # A server that may listen serves until it is stopped: this address is no machine's.
    return [*words, "--host", "192.0.2.1"] if name == "serve" else words


@cache
def _commands() -> dict[str, list[str]]:
    """Options by command, from the commands themselves."""
    group: Any = typer.main.get_command(application())
    return {
        name: sorted({option for parameter in command.params for option in parameter.opts if option.startswith("-")})
        for name, command in group.commands.items()
    }
