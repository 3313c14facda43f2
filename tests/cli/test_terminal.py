"""Text of users and files on the terminal: as it is, and never an order to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.command_line import sparsify

from sparsify.words import format_bytes, plain


@pytest.mark.parametrize("name", ["model[v1]", "a[/b]", "[bold]x", ":smile:"])
def test_a_name_prints_as_it_is(name: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / name
    done = sparsify("compile", folder("llama"), "--pass", "magnitude:2:4", "-o", out)
    assert done.returncode == 0, done.stderr
    assert name in done.stdout.replace("\n", "") and (out / "config.json").exists()


@pytest.mark.parametrize("words", [["\x1b[31mx"], ["inspect", "\x1b[31mx"], ["compile", "x", "--\x1b[31mx"]])
def test_escape_codes_are_escaped(words: list[str]) -> None:
    done = sparsify(*words)
    assert done.returncode and "\x1b" not in done.stdout + done.stderr and "x1b" in done.stderr


def test_plain() -> None:
    assert plain("a\x1b\x9b\u202e\ud800é\n") == r"a\x1b\x9b\u202e\ud800é\n" and plain("a\n\t", keep="\n\t") == "a\n\t"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--pass", "wanda:120%"], "sparsity 120%"),
        (["--pass", "wanda:2:4", "--samples", "0"], "fewer than one"),
        (["--pass", "wanda:2:4", "--seed", "-1"], "seed -1"),
        (["--pass", "wanda:2:4", "--calibration", "random", "--sequence-length", "65"], "context of llama is 64"),
    ],
)
def test_wrong_words_end_with_two(words: list[str], says: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    done = sparsify("compile", folder("llama"), *words, "-o", tmp_path / "out")
    assert (done.returncode, list(tmp_path.iterdir())) == (2, []) and says in done.stderr.replace("\n", " ")


def test_a_name_that_no_system_takes(folder: Callable[[str], Path], tmp_path: Path) -> None:
    done = sparsify("compile", folder("llama"), "--pass", "magnitude:2:4", "-o", tmp_path / ("x" * 300))
    assert done.returncode == 1 and "no name for a folder" in done.stderr.replace("\n", " ")


def test_little_memory_is_no_nothing() -> None:
    assert [format_bytes(n) for n in (1, 4096, 1 << 20)] == ["1 KiB", "4 KiB", "1 MiB"]
