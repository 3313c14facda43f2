"""Temporary folders: those of the dead go when the next one is made, and nothing else does."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

from sparsify.files.ownership import Scratch


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_those_of_the_dead_go_and_those_of_the_living_stay(place: Path) -> None:
    (place / "x-dead" / "inner").mkdir(parents=True)
    (place / "y-other").mkdir()
    with Scratch("x") as first, Scratch("x") as second:
        assert first != second and sorted(place.iterdir()) == sorted([place / "y-other", Path(first), Path(second)])
        assert not [*Path(first).iterdir()]
    assert [*place.iterdir()] == [place / "y-other"]


def test_what_is_no_folder_stays(place: Path) -> None:
    """A file or a link of such a name is not ours, nor where the link leads."""
    (place / "elsewhere").mkdir()
    (place / "elsewhere" / "mine").touch()
    (place / "x-file").touch()
    (place / "x-link").symlink_to("elsewhere")
    (place / "x-nowhere").symlink_to("none")
    before = sorted(place.rglob("*"))
    with Scratch("x"):
        pass
    assert sorted(place.rglob("*")) == before


def test_one_that_another_process_took_for_dead_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its making and its lock, where two processes begin at once."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    real, made = tempfile.mkdtemp, []

    def gone_at_once(*args: Any, **words: Any) -> str:
        made.append(real(*args, **words))
        if len(made) < 3:
            Path(made[-1]).rmdir()
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", gone_at_once)
    with Scratch("x") as place:
        assert len(made) == 3 and place == made[-1] and Path(place).is_dir()
    assert not list(tmp_path.iterdir())
