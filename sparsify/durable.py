"""Files and folders that are on the disk whole or not at all, also after a power cut: the calls that make them so.

Everything is made under a hidden name beside its place, synced, and moved there by one call. On Linux that call is
``renameat2``, which refuses to replace anything, or exchanges two names, in one step. Where the kernel, the C library
or the filesystem has none (NFS and some FUSE ones), :func:`move_new` renames, which of folders replaces an empty one
at most, and :func:`exchange` says that it cannot; who asked then needs two steps, and a way back from between them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

# Flags of renameat2, and where it takes relative paths from.
_NOREPLACE, _EXCHANGE, _HERE = 1, 2, -100
# What it and flock say where there is none for this place.
_NONE_HERE = frozenset({errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF})
# A name of more bytes is cut: filesystems hold 255, and ours get longer.
_LONGEST_STEM = 120


def beside(path: Path, what: str) -> Path:
    """The hidden name for the ``what`` of ``path``, in the same folder."""
    return path.with_name(f"{_stem(path)}.{what}")


def aside(path: Path, what: str) -> Path:
    """The same, and new at every call: for what is under construction (``partial``), or on its way out
    (``replaced``).
    """
    return beside(path, f"{what}-{secrets.token_hex(4)}")


def asides(path: Path) -> list[Path]:
    """Whatever was put aside for ``path`` and is still there, the newest first."""
    # The names of another output that begins like this one hold the word twice.
    ours = re.compile(re.escape(_stem(path)) + r"\.(?:partial|replaced)-(?!.*\.(?:partial|replaced)-).+", re.DOTALL)
    try:
        with os.scandir(path.parent) as entries:
            found = [path.with_name(entry.name) for entry in entries if ours.fullmatch(entry.name)]
    except OSError:
        return []
    return sorted(found, key=_changed, reverse=True)


def try_lock(fd: int) -> bool | None:
    """Whether this process now has the lock of the open file; None where the filesystem knows no locks.

    It is the kernel's, and gone with the process, whichever way that ends.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NONE_HERE:
            return None
        raise
    return True


def is_open_at(fd: int, path: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk. Some filesystems know no such thing for folders."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NONE_HERE or not stat.S_ISDIR(os.fstat(fd).st_mode):
            raise
    finally:
        os.close(fd)


def sync_tree(folder: Path) -> None:
    """Bring a folder and everything in it to the disk."""
    for inner, _, files in os.walk(folder, topdown=False):
        for name in files:
            path = Path(inner) / name
            if not path.is_symlink():
                sync(path)
        sync(Path(inner))


def make_folders(folder: Path, mode: int = 0o777) -> None:
    """Make ``folder`` and those above it that are not there yet, with ``mode``, less the umask."""
    if folder.is_dir():
        return
    make_folders(folder.parent, mode)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode)
        sync(folder.parent)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))


def move_new(one: Path, place: Path) -> None:
    """Rename the folder ``one`` to ``place``, where there must be nothing.

    Raises:
        FileExistsError: there is something.
    """
    if _rename(one, place, _NOREPLACE):
        return
    try:
        one.rename(place)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place)) from error
        raise


def exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one step; False, and nothing done, where the system cannot."""
    return _rename(one, other, _EXCHANGE)


def discard(folder: Path) -> None:
    """Remove a folder with all that is in it, as far as that goes; what is left is tried again by the next run."""
    shutil.rmtree(folder, ignore_errors=True)
    if not folder.is_dir() or folder.is_symlink():
        return
    for inner, _, _ in os.walk(folder):
        with contextlib.suppress(OSError):
            Path(inner).chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)


def write_whole(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Make ``content`` that of the file ``path``, which is at every moment the older one or the new one, whole.

    A link is followed. What is no ordinary file, a terminal say, is written to as it is.

    Args:
        mode: of a new file, less the umask; an older one's stays.

    Raises:
        OSError: it cannot be written; then all is as it was.
    """
    if path.is_relative_to("/dev") or (path.exists() and not path.is_file()):
        path.write_bytes(content)
        return
    path = path.resolve()
    for left in asides(path):
        _remove_dead(left)
    fd, own = _open_aside(path, mode)
    try:
        with os.fdopen(fd, "wb") as file:
            if path.exists():
                os.fchmod(fd, stat.S_IMODE(path.stat().st_mode))
            file.write(content)
            file.flush()
            os.fsync(fd)
            own.replace(path)
    except BaseException:
        own.unlink(missing_ok=True)
        raise
    sync(path.parent)


def _open_aside(path: Path, mode: int) -> tuple[int, Path]:
    """A new file beside ``path`` that this process owns."""
    while True:
        own = aside(path, "partial")
        fd = os.open(own, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, mode)
        # Until it is locked, another process may take it for a dead one's.
        if try_lock(fd) is not False and is_open_at(fd, own):
            return fd, own
        os.close(fd)


def _remove_dead(path: Path) -> None:
    """Remove a file that nobody writes any more."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return
    try:
        if try_lock(fd) and is_open_at(fd, path):
            path.unlink(missing_ok=True)
    finally:
        os.close(fd)


def _changed(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0


def _stem(path: Path) -> str:
    name = os.fsencode(path.name)
    if len(name) <= _LONGEST_STEM:
        return f".{path.name}"
    return f".{name[:_LONGEST_STEM].decode(errors='ignore')}~{hashlib.blake2b(name, digest_size=8).hexdigest()}"


def _rename(one: Path, other: Path, flag: int) -> bool:
    call = renameat2()
    if call is None:
        return False
    if call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NONE_HERE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


@functools.cache
def renameat2() -> Callable[[int, bytes, int, bytes, int], int] | None:
    """The C library's; None where it has none."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return None
    call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return call
