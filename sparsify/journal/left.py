"""What interrupted runs left in a folder: journals, outputs under construction, locks of processes that are gone."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from errno import ENOTDIR
from os import strerror
from pathlib import Path
from typing import Any, Literal

from sparsify.durable import beside, discard, is_open_at, move_new, sync, try_lock
from sparsify.words import format_bytes

UNFINISHED, ASKED, LINES = "unfinished", "asked.json", "journal.jsonl"
_LOCK = "sparsify-lock"
# `.OUT.partial-1a2b3c4d` and such, as :mod:`sparsify.durable` and :mod:`.journal` name them.
_OURS = re.compile(
    r"\.(?P<out>.+)\.(?P<kind>unfinished|partial|replaced)-[0-9a-f]{8,16}|\.(?P<locked>.+)\.sparsify-lock", re.DOTALL
)
Kind = Literal["unfinished", "partial", "replaced", "lock"]


@dataclass(frozen=True)
class Left:
    """One thing that lies beside an output.

    Attributes:
        kind: ``unfinished``, a journal, which --resume goes on with; ``partial``, an output under construction;
            ``replaced``, an older output; ``lock``. size: bytes. finished: lines of a journal. asked, typed: of what
            job; alive: a process is at work on it.
    """

    path: Path
    out: Path
    kind: Kind
    size: int = 0
    finished: int = 0
    asked: Mapping[str, Any] = field(default_factory=dict)
    typed: Mapping[str, Any] | None = None
    alive: bool = False

    def line(self) -> str:
        """For people."""
        said = {
            "unfinished": f"{self.finished} finished parts of a run to {self.out}, which --resume goes on with"
            if self.finished
            else f"a run to {self.out} that had finished nothing",
            "partial": f"what a run to {self.out} was writing",
            "replaced": f"an older {self.out}, which the next run puts back where nothing is in its place",
            "lock": f"the lock of a run to {self.out}",
        }[self.kind]
        passes = self.asked.get("passes")
        of = f" ({', '.join(map(str, passes))})" if isinstance(passes, list) else ""
        return f"{self.path}: {format_bytes(self.size)}, {said}{of}{'; at work now' if self.alive else ''}"

    def as_dict(self) -> dict[str, Any]:
        said: dict[str, Any] = {"path": str(self.path), "output": str(self.out), "kind": self.kind, "bytes": self.size}
        return said | {"finished": self.finished, "asked": dict(self.asked), "alive": self.alive}


def left_in(folder: Path) -> list[Left]:
    """Everything in ``folder`` that has one of our hidden names, the oldest first.

    Raises:
        OSError: the folder cannot be looked into.
    """
    found = [left for path in sorted(folder.iterdir(), key=_changed) if (left := _look(path)) is not None]
    # The lock of what is listed goes with it.
    others = {left.out for left in found if left.kind != "lock"}
    return [left for left in found if left.kind != "lock" or left.out not in others]


def left_at(place: Path) -> list[Left]:
    """What is left in the folder ``place``, and beside it of runs that were to write ``place`` itself.

    Raises:
        OSError: no such folder, and nothing left of one.
    """
    whole = place.absolute()
    inside = left_in(place) if place.is_dir() else []
    try:
        beside_it = [left for left in left_in(whole.parent) if left.out.absolute() == whole]
    except OSError:
        beside_it = []
    if not beside_it and not place.is_dir():
        place.stat()
        raise NotADirectoryError(ENOTDIR, strerror(ENOTDIR), str(place))
    return [*inside, *beside_it]


def out_of(path: Path) -> Path:
    """The output that the thing of ours at ``path`` is left of."""
    found = _OURS.fullmatch(path.name)
    return path.parent if found is None else path.with_name(found["out"] or found["locked"])


def left_of(out: Path) -> list[Left]:
    """The journals of jobs that were to write ``out``, the newest first; for whoever is the one to write it now."""
    stem = beside(out.absolute(), UNFINISHED).name
    try:
        paths = [path for path in out.absolute().parent.iterdir() if path.name.rpartition("-")[0] == stem]
    except OSError:
        return []
    return [left for path in sorted(paths, key=_changed, reverse=True) if (left := _look(path, ours=True)) is not None]


def remove(left: Left) -> bool:
    """Remove it, unless a process is at work on it; an older output whose place is empty goes back there instead.

    Returns:
        Whether it is gone.
    """
    with _locked(left) as ours:
        if not ours:
            return False
        if left.kind == "replaced" and not os.path.lexists(left.out):
            move_new(left.path, left.out)
            sync(left.out.parent)
        elif left.path.is_dir() and not left.path.is_symlink():
            discard(left.path)
        else:
            left.path.unlink(missing_ok=True)
        # While it is held, as by whoever would have let it go.
        _lock_of(left).unlink(missing_ok=True)
    return not os.path.lexists(left.path)


def _look(path: Path, *, ours: bool = False) -> Left | None:
    """Args:
    ours: the output is this process's own to write.
    """
    named = _OURS.fullmatch(path.name)
    if named is None:
        return None
    out = out_of(path)
    kind: Any = named["kind"] or "lock"
    left = Left(path, out, kind, _size(path))
    if kind == "unfinished":
        told = _told(path)
        place = told.get("output")
        left = Left(
            path,
            Path(place) if isinstance(place, str) else out,
            kind,
            left.size,
            _count(path / LINES),
            asked if isinstance(asked := told.get("asked"), dict) else {},
            typed if isinstance(typed := told.get("typed"), dict) else None,
        )
    with _lock(path) if ours else _locked(left) as free:
        return left if free else replace(left, alive=True)


@contextlib.contextmanager
def _locked(left: Left) -> Iterator[bool]:
    """Hold what a process at work on it would hold; False where one does."""
    with contextlib.ExitStack() as stack:
        paths = [_lock_of(left), *([left.path] if left.kind != "lock" else [])]
        held = [stack.enter_context(_lock(path)) for path in paths]
        yield all(held)


def _lock_of(left: Left) -> Path:
    """By the name as it lies there: of a long one that is not the output's."""
    stem = left.path.name.removesuffix(f".{_LOCK}")
    return left.path.with_name(f"{stem if left.kind == 'lock' else stem.rpartition(f'.{left.kind}-')[0]}.{_LOCK}")


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        # Nobody's, or a link, which is none of ours.
        yield True
        return
    try:
        yield try_lock(fd) is not False and is_open_at(fd, path)
    finally:
        os.close(fd)


def _told(folder: Path) -> dict[str, Any]:
    try:
        told = json.loads((folder / ASKED).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def _count(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0


def _size(path: Path) -> int:
    """Bytes that it takes; links are not followed."""
    total = 0
    with contextlib.suppress(OSError):
        total = path.lstat().st_size if not path.is_dir() or path.is_symlink() else 0
    for inner, _, files in os.walk(path) if total == 0 else ():
        for name in files:
            with contextlib.suppress(OSError):
                total += (Path(inner) / name).lstat().st_size
    return total


def _changed(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0
