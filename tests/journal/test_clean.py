"""What interrupted runs left is listed with its size, and removed when that is asked for; what is alive stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.families import deep
from support.interrupted import IDS, hidden, interrupted_after
from typer.testing import CliRunner

import sparsify
from sparsify.cli.main import application
from sparsify.durable import aside, try_lock
from sparsify.files.ownership import Claim
from sparsify.journal.left import left_in, left_of, remove


def clean(*words: object) -> str:
    done = CliRunner().invoke(application("clean"), ["clean", *map(str, words)])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Two runs that were interrupted, one of them killed while it wrote, beside an output and files of the user's."""
    deep("llama", 1).save_pretrained(tmp_path / "model")
    place = tmp_path / "place"
    for name, spec in (("a", "wanda:2:4"), ("b", "magnitude:2:4")):
        with interrupted_after(2), pytest.raises(KeyboardInterrupt):
            sparsify.compile(tmp_path / "model", spec, calibration=IDS, output=place / name)
    partial = aside(place / "b", "partial")
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(bytes(3 << 20))
    (place / ".b.sparsify-lock").write_text("")
    (place / ".c.sparsify-lock").write_text("")
    (place / "out").mkdir()
    for name in (".mine", ".mine.partial-download", ".b.unfinished-thesis", "b.partial-12345678"):
        (place / name).write_text("mine")
    return place


MINE = {".mine", ".mine.partial-download", ".b.unfinished-thesis", "b.partial-12345678", "out"}


def test_it_is_listed_and_nothing_happens(place: Path) -> None:
    before = sorted(place.iterdir())
    said = clean(place)
    assert "2 finished parts of a run to" in said and "(wanda:2:4)" in said and "(magnitude:2:4)" in said
    assert "3 MiB, what a run to" in said and "the lock of a run to" in said
    assert "--yes removes 4 of 4, 3 MiB" in said and sorted(place.iterdir()) == before
    found = json.loads(clean(place, "--json"))
    assert [(each["kind"], each["finished"], each["removed"]) for each in found] == [
        ("unfinished", 2, False), ("unfinished", 2, False), ("partial", 0, False), ("lock", 0, False),
    ]  # fmt: skip


def test_it_is_removed_when_that_is_asked_for(place: Path) -> None:
    assert "removed 4 of 4, 3 MiB" in clean(place, "--yes")
    assert {path.name for path in place.iterdir()} == MINE
    assert "nothing is left" in clean(place)


def test_what_a_run_is_at_work_on_stays(place: Path) -> None:
    (journal,) = left_of(place / "a")
    fd = os.open(journal.path, os.O_RDONLY)
    assert try_lock(fd)
    said = clean(place, "--yes")
    assert "at work now" in said and "removed 3 of 4" in said and journal.path.exists()
    os.close(fd)
    Claim(place / "a").release()
    with Claim(place / "a"):
        assert "removed 0 of 1" in clean(place, "--yes") and journal.path.exists()
    assert "removed 1 of 1" in clean(place, "--yes") and not journal.path.exists()


def test_an_older_output_goes_back_to_its_place(tmp_path: Path) -> None:
    old = aside(tmp_path / "out", "replaced")
    old.mkdir()
    (old / "sparsify.json").write_text("old")
    (left,) = left_in(tmp_path)
    assert "puts back" in left.line() and remove(left)
    assert (tmp_path / "out" / "sparsify.json").read_text() == "old" and not hidden(tmp_path)
    old.mkdir()
    (left,) = left_in(tmp_path)
    assert remove(left) and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["x" * 200, "ü" * 120, "a.partial-12345678", "a.unfinished-b", "with space"])
def test_names_of_outputs(name: str, tmp_path: Path) -> None:
    deep("llama", 1).save_pretrained(tmp_path / "model")
    place = tmp_path / "place"
    with interrupted_after(2), pytest.raises(KeyboardInterrupt):
        sparsify.compile(tmp_path / "model", "magnitude:2:4", output=place / name)
    aside(place / name, "partial").mkdir()
    assert [left.finished for left in left_of(place / name)] == [2]
    journal, partial = sorted(left_in(place), key=lambda left: left.kind, reverse=True)
    assert journal.out == place / name
    with Claim(tmp_path / "other"):
        assert remove(journal) and remove(partial)
    assert not hidden(place)


def test_links_and_things_without_facts(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / ".out.partial-12345678"
    target.mkdir()
    (target / "x").write_text("mine")
    link.symlink_to(target)
    empty = tmp_path / ".out.unfinished-1234567890abcdef"
    empty.mkdir()
    (empty / "asked.json").write_text('["[', encoding="utf-8")
    assert "removed 2 of 2" in clean(tmp_path, "--yes")
    assert not link.is_symlink() and (target / "x").read_text() == "mine" and not empty.exists()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sparsify", "clean", tmp_path / "none"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "No such file" in done.stderr


def test_one_output_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "removed 2 of 2" in clean(place / "b", "--yes")
    assert {left.out.name for left in left_in(place)} == {"a", "c"}
    monkeypatch.chdir(place)
    assert "(wanda:2:4)" in clean("a") and "removed 1 of 1" in clean("a", "--yes")
    # An output that is there, and a folder in which nothing is left.
    assert "nothing is left" in clean("out")
    for name in ("nobodys", ".mine"):
        done = CliRunner().invoke(application("clean"), ["clean", name])
        assert done.exit_code == 1 and "Name a folder, or an output" in done.output
