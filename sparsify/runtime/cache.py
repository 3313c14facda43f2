"""The user's cache folder: compiled kernels and what they were timed to take.

What lies there is run. So nothing is taken from it, nor put into it, unless the folder and the file belong to this
user or root and nobody else may write to them. Who may not write to the folder cannot change what it names either:
after that was seen of an open folder and file, no second look is needed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsify.durable import aside, asides, discard, is_open_at, make_folders, try_lock, write_whole
from sparsify.errors import Refused, SpecError

# Codes of what is refused: others may write to its folder; it is not there yet.
UNSAFE, ABSENT = "unsafe", "absent"


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``$SPARSIFY_CACHE``, or ``sparsify`` in the user's cache folder.

    Raises:
        SpecError: this user has no home.
    """
    own, shared = os.environ.get("SPARSIFY_CACHE"), Path(os.environ.get("XDG_CACHE_HOME", ""))
    if own:
        return Path(own).absolute()
    # The specification of XDG_CACHE_HOME has relative ones ignored.
    if shared.is_absolute():
        return shared / "sparsify"
    try:
        home = Path.home()
    except RuntimeError:
        home = Path()
    if not home.is_absolute():
        raise SpecError("the cache folder", found="this user has no home", do="Name one in SPARSIFY_CACHE")
    return home / ".cache" / "sparsify"


def open_own(path: Path) -> int | Refused:
    """The file of the cache, open for reading; its folder is made where it is not there yet.

    Returns:
        Refused, with the code ``UNSAFE``: others may write to the folder. ``ABSENT``: the file is not there. With none:
        it is not ours alone, and may be made again.

    Raises:
        OSError: the folder cannot be made or read.
    """
    make_folders(path.parent, 0o700)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if why := _foreign(os.fstat(folder)):
            return Refused(f"the cache folder {path.parent} {why}", str(path.parent), UNSAFE)
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            fd = os.open(path.name, flags, dir_fd=folder)
        except FileNotFoundError:
            return Refused(f"{path} is not there", str(path), ABSENT)
        except OSError as error:
            return Refused(f"{path}: {error.strerror}", str(path))
    finally:
        os.close(folder)
    state = os.fstat(fd)
    why = _foreign(state) if stat.S_ISREG(state.st_mode) else "is no ordinary file"
    if why:
        os.close(fd)
        return Refused(f"{path} {why}", str(path))
    return fd


def read_open(fd: int) -> bytes:
    """All of a file, which stays open."""
    with os.fdopen(os.dup(fd), "rb") as file:
        file.seek(0)
        return file.read()


def read_whole(path: Path) -> bytes | None:
    """The content of a file of the cache; None where it is not there, or somebody else may have written it."""
    try:
        fd = open_own(path)
        if isinstance(fd, Refused):
            _say_unsafe(fd)
            return None
        try:
            return read_open(fd)
        finally:
            os.close(fd)
    except OSError:
        return None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of the cache; an empty one where there is none, or the file is damaged."""
    try:
        content = json.loads(read_whole(path) or b"{}")
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def put_whole(path: Path, content: bytes) -> None:
    """Write a file of the cache at once: of two processes that get here together each renames a whole one.

    A folder that cannot be written costs the work once more the next time, and nothing else; of one that others may
    write to a warning says so.
    """
    try:
        why = replace_own(path, content)
    except OSError:
        return
    if why is not None:
        _say_unsafe(why)


def replace_own(path: Path, content: bytes) -> Refused | None:
    """:func:`put_whole`, which says what hinders it.

    Raises:
        OSError: it cannot be written.
    """
    found = open_own(path)
    if not isinstance(found, Refused):
        os.close(found)
    elif found.code == UNSAFE:
        return found
    elif found.code != ABSENT:
        # A link, a pipe, a file that others may write to: its place is taken, and what it was is not kept.
        path.unlink(missing_ok=True)
    write_whole(path, content, mode=0o600)
    return None


@contextlib.contextmanager
def workshop(folder: Path) -> Iterator[Path]:
    """A folder in the cache for making what goes there; those of processes that were killed go first."""
    name = folder / "build"
    sweep(folder)
    while True:
        made = aside(name, "partial")
        made.mkdir(0o700)
        # Until it is locked, another process may take it for a dead one's.
        try:
            fd = os.open(made, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        if try_lock(fd) is not False and is_open_at(fd, made):
            break
        os.close(fd)
    try:
        yield made
    finally:
        discard(made)
        os.close(fd)


def sweep(folder: Path) -> None:
    """Remove what processes that were killed were making in the cache."""
    for left in asides(folder / "build"):
        with contextlib.suppress(OSError):
            fd = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                if try_lock(fd) and is_open_at(fd, left):
                    discard(left)
            finally:
                os.close(fd)


def _foreign(state: os.stat_result) -> str | None:
    """Who but this user and root can change it; None where nobody can."""
    if state.st_uid not in (os.geteuid(), 0):
        return f"belongs to another user (number {state.st_uid})"
    if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"may be written by others (mode {stat.S_IMODE(state.st_mode):04o})"
    return None


def advice(folder: str) -> str:
    return f"Take their right away (chmod go-w {folder}), or name a folder of your own in SPARSIFY_CACHE"


def _say_unsafe(why: Refused) -> None:
    if why.code == UNSAFE:
        _warn(f"{why.reason}: it is not used, and kernels are made and timed in every process. {advice(why.node)}")


@functools.cache
def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=4)
