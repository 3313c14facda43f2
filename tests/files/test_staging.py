from __future__ import annotations

import gc
import os
import shutil
import stat
from collections import namedtuple
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from sparsify import durable
from sparsify.durable import aside, beside
from sparsify.errors import BackendError
from sparsify.files import ownership
from sparsify.files import staging as staging_module
from sparsify.files.staging import Staging, check_output


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
    with pytest.raises(BackendError, match="1 KiB free, 10 MiB needed"):
        Staging(tmp_path / "out", need=10**7)
    assert not list(tmp_path.iterdir())


def test_an_existing_output_needs_overwrite(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sparsify.json").write_text("")
    with pytest.raises(BackendError, match="--overwrite"):
        Staging(tmp_path / "out")
    with Staging(tmp_path / "out", overwrite=True) as staging:
        (staging.folder / "new").write_text("")
        assert (tmp_path / "out" / "sparsify.json").exists()
        staging.commit()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new"] and not partials(tmp_path)


OURS = ["sparsify.json", "compare.json", "adapter_config.json", "decoder.onnx", "state.safetensors", "config.json"]


@pytest.mark.parametrize("name", OURS)
def test_an_output_or_a_model_may_be_replaced(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text('{"model_type": "llama"}')
    with Staging(out, overwrite=True) as staging:
        staging.commit()
    assert [*out.iterdir()] == []


@pytest.mark.parametrize("name", ["thesis.txt", "config.json", "models/sparsify.json", ".git/config", "x.onnx/y"])
def test_no_other_folder_is_replaced(tmp_path: Path, name: str) -> None:
    """What other programs call config.json, and folders of outputs, are no outputs."""
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text('{"port": 80}')
    first = name.split("/")[0]
    for look in (lambda: check_output(out, overwrite=True, source=None), lambda: Staging(out, overwrite=True)):
        with pytest.raises(BackendError, match=f"with {first} in it.*delete it yourself"):
            look()
    assert (out / name).read_text() == '{"port": 80}' and [*tmp_path.iterdir()] == [out]


@pytest.mark.parametrize("place", ["file/out", "file/deep/out", "/proc/out", "/proc/deep/out"])
def test_an_output_that_cannot_be_made_is_told_at_once(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendError, match="cannot be made"):
        check_output(tmp_path / place, overwrite=False, source=None)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_look_at_the_place_leaves_nothing_and_keeps_others_away(tmp_path: Path) -> None:
    assert check_output(tmp_path / "new" / "deep" / "out", overwrite=False, source=None) is None
    assert not [*tmp_path.iterdir()]
    claim = check_output(tmp_path / "out", overwrite=False, source=None)
    assert claim is not None
    with pytest.raises(BackendError, match="another job is writing it now"):
        check_output(tmp_path / "out", overwrite=False, source=None)
    claim.release()
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["x" * 256, "a\0b"])
def test_a_name_that_no_folder_can_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(BackendError, match="no name for a folder"):
        Staging(tmp_path / name)


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


@pytest.mark.parametrize("name", ["out", "a[b]*?", "ü" * 127 + "x", "line\nbreak", "a.partial-b"])
def test_what_dead_owners_left_is_removed_by_the_next(tmp_path: Path, name: str) -> None:
    """Whatever host, process or name; what belongs to outputs with longer names stays."""
    out = tmp_path / name
    with Staging(out) as staging:
        left = [aside(out, "partial"), aside(out, "replaced")]
        if len(name) < 100:
            left += [tmp_path / f".{name}.partial-another-host.lan-1", tmp_path / f".{name}.replaced-host-1"]
        others = [aside(tmp_path / f"{name[:90]}.partial-x", "partial"), aside(tmp_path / f"x{name[:90]}", "partial")]
        staging.commit()
    for path in left + others:
        path.mkdir()
        (path / "x").write_text("")
    with Staging(out, overwrite=True) as staging:
        assert [*staging.folder.parent.glob("*/x")] and not any(path.exists() for path in left)
        staging.commit()
    assert sorted(tmp_path.iterdir()) == sorted([out, *others])


def test_the_lock_of_a_dead_owner_stops_nobody(tmp_path: Path) -> None:
    lock = beside(tmp_path / "out", "sparsify-lock")
    lock.write_text("")
    lock.chmod(0o444)
    with Staging(tmp_path / "out") as staging:
        staging.commit()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_output_that_was_moved_aside_comes_back(tmp_path: Path) -> None:
    """As where names cannot be exchanged, and the job was killed between its two steps."""
    out, old, older = tmp_path / "out", aside(tmp_path / "out", "replaced"), aside(tmp_path / "out", "replaced")
    for path in (older, old):
        path.mkdir()
        (path / path.name).write_text("")
    os.utime(older, (0, 0))
    with pytest.warns(RuntimeWarning, match="the older one is back"), pytest.raises(BackendError, match="--overwrite"):
        check_output(out, overwrite=False, source=None)
    assert [p.name for p in out.iterdir()] == [old.name] and [*tmp_path.iterdir()] == [out]


def test_one_job_at_a_time(tmp_path: Path) -> None:
    """The second is told, at once, and deletes nothing; the first goes on."""
    with Staging(tmp_path / "out") as first:
        (first.folder / "x").write_text("1")
        for look in (
            lambda: Staging(tmp_path / "out"),
            lambda: check_output(tmp_path / "out", overwrite=True, source=None),
        ):
            with pytest.raises(BackendError, match="another job is writing it now"):
                look()
        first.commit()
    assert (tmp_path / "out" / "x").read_text() == "1" and not partials(tmp_path)


def test_a_job_that_was_dropped_locks_nobody_out(tmp_path: Path) -> None:
    Staging(tmp_path / "out")
    gc.collect()
    with Staging(tmp_path / "out") as staging:
        staging.commit()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("overwrite", [True, False])
def test_what_came_there_meanwhile_is_not_replaced(
    tmp_path: Path, monkeypatch: Any, exchange: bool, overwrite: bool
) -> None:
    """By something else than a job of ours. With --overwrite an output is; a file, a link or their folder never."""
    if not exchange:
        monkeypatch.setattr(durable, "renameat2", lambda: None)
    out = tmp_path / "out"

    def folder(name: str = "sparsify.json") -> None:
        out.mkdir()
        (out / name).write_text("")

    for come in (folder, lambda: folder("theirs"), out.touch, lambda: out.symlink_to("x")):
        told = pytest.raises(BackendError) if not overwrite or come is not folder else nullcontext()
        with told, Staging(out, overwrite=overwrite) as staging:
            come()
            staging.commit()
        assert len([*tmp_path.iterdir()]) == 1
        if not overwrite or come is not folder:
            assert out.is_symlink() or out.is_file() or [*out.iterdir()]
            out.unlink() if not out.is_dir() or out.is_symlink() else shutil.rmtree(out)
        else:
            assert [*out.iterdir()] == []
            shutil.rmtree(out)


@pytest.mark.parametrize("exchange", [True, False])
def test_a_rename_that_fails_leaves_the_older_one(tmp_path: Path, monkeypatch: Any, exchange: bool) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "sparsify.json").write_text("")
    calls: list[Path] = []

    def fails(one: Path, place: Path, real: Any = durable.move_new) -> None:
        calls.append(place)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        real(one, place)

    monkeypatch.setattr(staging_module, "move_new", fails)
    if exchange:
        monkeypatch.setattr(staging_module, "exchange", lambda one, other: fails(one, aside(other, "partial")))
    else:
        monkeypatch.setattr(durable, "renameat2", lambda: None)
    with pytest.raises(BackendError, match="Input/output error"), Staging(out, overwrite=True) as staging:
        staging.commit()
    assert [p.name for p in out.iterdir()] == ["sparsify.json"] and not partials(tmp_path)


def test_an_older_output_that_resists_is_removed_all_the_same(tmp_path: Path) -> None:
    inner = tmp_path / "out" / "closed"
    inner.mkdir(parents=True)
    (inner / "x").write_text("")
    inner.chmod(0o500)
    (tmp_path / "out" / "sparsify.json").write_text("")
    with Staging(tmp_path / "out", overwrite=True) as staging:
        staging.commit()
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and not partials(tmp_path)


def test_without_locks_nothing_is_taken_for_dead(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(ownership, "try_lock", lambda fd: None)
    other = aside(tmp_path / "out", "partial")
    other.mkdir()
    with pytest.warns(RuntimeWarning, match="without locks"), Staging(tmp_path / "out") as staging:
        staging.commit()
    assert (tmp_path / "out").is_dir() and other.is_dir()


def test_the_work_is_closed_to_others(tmp_path: Path) -> None:
    with Staging(tmp_path / "out") as staging:
        assert stat.S_IMODE(staging.folder.stat().st_mode) == 0o700
        staging.commit()
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_place_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendError, match="cannot be made"):
        Staging(tmp_path / "file" / "out")
