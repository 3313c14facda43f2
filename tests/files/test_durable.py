"""Single files that are whole or as they were, names that are short enough, and what is synced when."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from sparsify import durable
from sparsify.durable import aside, exchange, make_folders, move_new, renameat2, write_whole
from sparsify.errors import BackendError
from sparsify.files.single import put_file
from sparsify.files.staging import Staging
from sparsify.runtime.cache import put_whole


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_file_keeps_its_mode_and_links_are_followed(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to("real")
    write_whole(link, b"new")
    assert real.read_text() == "new" and link.is_symlink() and mode(real) == 0o640
    write_whole(tmp_path / "fresh", b"", mode=0o600)
    assert mode(tmp_path / "fresh") == 0o600 and len([*tmp_path.iterdir()]) == 3


def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write_whole(tmp_path / "pipe", b"content")
    reader.join()
    assert read == [b"content"] and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_an_error_leaves_the_older_file_and_nothing_else(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "x").write_text("old")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BackendError, match="No space left on device"):
        put_file(tmp_path / "x", b"new")
    put_whole(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_text() == "old" and len([*tmp_path.iterdir()]) == 1


def test_files_that_the_dead_left_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    dead, alive = aside(tmp_path / "x", "partial"), aside(tmp_path / "x", "partial")
    dead.write_text("half")
    with alive.open("w") as file:
        assert durable.try_lock(file.fileno())
        write_whole(tmp_path / "x", b"")
        assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "x", alive])
    write_whole(tmp_path / "x", b"")
    assert [*tmp_path.iterdir()] == [tmp_path / "x"]


def test_a_file_that_has_lost_its_name_is_not_the_one_of_it(tmp_path: Path) -> None:
    """A lock on it would say nothing."""
    with (tmp_path / "x").open("w") as file:
        assert durable.is_open_at(file.fileno(), tmp_path / "x")
        (tmp_path / "x").unlink()
        assert not durable.is_open_at(file.fileno(), tmp_path / "x")
        (tmp_path / "x").touch()
        assert not durable.is_open_at(file.fileno(), tmp_path / "x")


def test_what_the_dead_left_may_go_while_we_look_at_it(tmp_path: Path, monkeypatch: Any) -> None:
    """By a cleaner that knows no locks."""
    left, real = aside(tmp_path / "x", "partial"), durable.is_open_at
    left.touch()

    def gone(fd: int, path: Path) -> bool:
        there = real(fd, path)
        if path == left:
            left.unlink()
        return there

    monkeypatch.setattr(durable, "is_open_at", gone)
    write_whole(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_text() == "new" and [*tmp_path.iterdir()] == [tmp_path / "x"]


def test_a_cache_is_its_users_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        put_whole(tmp_path / "deep" / "cache" / "x", b"code")
    finally:
        os.umask(before)
    assert mode(tmp_path / "deep" / "cache") == 0o700 and mode(tmp_path / "deep" / "cache" / "x") == 0o600


def test_a_cache_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    put_whole(tmp_path / "file" / "x", b"code")


@pytest.mark.parametrize("length", [1, 120, 121, 255])
@pytest.mark.parametrize("letter", ["x", "ü", "\udcff"])
def test_hidden_names_are_short_and_tell_long_ones_apart(tmp_path: Path, length: int, letter: str) -> None:
    names = [letter * (length // len(os.fsencode(letter)) - 1) + end for end in "ab"]
    hidden = {aside(tmp_path / name, "partial") for name in names}
    assert len(hidden) == 2 and all(len(os.fsencode(path.name)) <= 255 for path in hidden)
    for path in hidden:
        path.mkdir()
    assert [durable.asides(tmp_path / name) for name in names] == [
        [p] for p in sorted(hidden, key=lambda p: durable.asides(tmp_path / names[0]) != [p])
    ]


@pytest.mark.parametrize("here", [True, False])
def test_nothing_is_replaced(tmp_path: Path, monkeypatch: Any, here: bool) -> None:
    if not here:
        monkeypatch.setattr(durable, "renameat2", lambda: None)
    one, other = tmp_path / "one", tmp_path / "other"
    for path in (one, other):
        path.mkdir()
        (path / path.name).touch()
    with pytest.raises(FileExistsError):
        move_new(one, other)
    with pytest.raises(FileNotFoundError):
        move_new(tmp_path / "none", tmp_path / "new")
    assert exchange(one, other) is here
    assert [p.name for p in one.iterdir()] == ["other" if here else "one"]


@pytest.mark.parametrize("number", [22, 38, 95])
def test_a_filesystem_without_the_call(tmp_path: Path, monkeypatch: Any, number: int) -> None:
    import ctypes

    def refuses(*args: Any) -> int:
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(durable, "renameat2", lambda: refuses)
    (tmp_path / "one").mkdir()
    move_new(tmp_path / "one", tmp_path / "two")
    assert not exchange(tmp_path / "two", tmp_path) and (tmp_path / "two").is_dir()


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(NotADirectoryError):
        make_folders(tmp_path / "x")


def test_all_is_on_the_disk_before_it_is_in_its_place(tmp_path: Path, monkeypatch: Any) -> None:
    """Every file and folder is synced, then moved; its new name is synced before the older output goes."""
    said: list[str] = []
    real_sync, real_call, real_unlink = os.fsync, renameat2(), os.unlink
    assert real_call is not None

    def synced(fd: int) -> None:
        said.append(str(Path(f"/proc/self/fd/{fd}").readlink().relative_to(tmp_path)))
        real_sync(fd)

    def called(*args: Any) -> int:
        said.append("move")
        return real_call(*args)

    def gone(*args: Any, **kwargs: Any) -> None:
        said.append(f"unlink {Path(args[0]).name}")
        real_unlink(*args, **kwargs)

    out = tmp_path / "a" / "b" / "out"
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "unlink", gone)
    monkeypatch.setattr(durable, "renameat2", lambda: called)
    for overwrite in (False, True):
        said.clear()
        with Staging(out, overwrite=overwrite) as staging:
            (staging.folder / "inner").mkdir()
            for name in ("sparsify.json", "inner/y"):
                (staging.folder / name).write_text(name)
            partial = str(staging.folder.relative_to(tmp_path))
            staging.commit()
        if not overwrite:
            assert said[:2] == [".", "a"], "folders made on the way"
        move = said.index("move")
        assert set(said[:move]) >= {partial, f"{partial}/sparsify.json", f"{partial}/inner", f"{partial}/inner/y"}
        after = said[move:]
        assert after.index("a/b") < min(i for i, s in enumerate(after) if s.startswith("unlink"))
