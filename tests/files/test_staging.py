from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from sparsify.errors import BackendError
from sparsify.files.staging import Staging


def partials(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


def test_the_output_appears_at_the_commit_and_not_before(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with Staging(out) as staging:
        (staging.folder / "x").write_text("1")
        assert not out.exists()
        staging.commit()
    assert (out / "x").read_text() == "1" and not partials(out.parent)


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x"), Staging(tmp_path / "out") as staging:
        (staging.folder / "x").write_text("1")
        raise ValueError("x")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_midway_is_an_error_with_the_cause(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="No space left"), Staging(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_no_room_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: Any) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(BackendError, match=r"0\.00 GB free, 0\.01 GB needed"):
        Staging(tmp_path / "out", need=10**7)
    assert not list(tmp_path.iterdir())


def test_an_existing_output_needs_overwrite(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")
    with pytest.raises(BackendError, match="--overwrite"):
        Staging(tmp_path / "out")
    with Staging(tmp_path / "out", overwrite=True) as staging:
        (staging.folder / "new").write_text("")
        assert (tmp_path / "out" / "old").exists()
        staging.commit()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new"] and not partials(tmp_path)


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_file_or_link_in_the_way_is_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(BackendError, match="a file or a link"):
        Staging(tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("place", ["source", "source/inside", "."])
def test_the_source_is_never_an_output(tmp_path: Path, place: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with pytest.raises(BackendError, match="The source is never written"):
        Staging(tmp_path / place, overwrite=True, source=source)


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    left = Staging(tmp_path / "out")
    dead = left.folder.with_name(left.folder.name.rpartition("-")[0] + "-999999999")
    left.folder.rename(dead)
    with Staging(tmp_path / "out") as staging:
        assert not dead.exists() and staging.folder.exists()


def test_a_place_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendError, match="cannot be made"):
        Staging(tmp_path / "file" / "out")
