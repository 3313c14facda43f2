"""Who writes an output now: one job at a time, and what dead ones left is put right before it begins.

The mark of a job is the kernel's lock on a hidden file beside the output. It is gone with the process, so it says who
is alive across hosts (where the filesystem's locks do), containers and threads; whatever lies there while nobody else
holds it was left by the dead.
"""

from __future__ import annotations

import os
import tempfile
import warnings
import weakref
from pathlib import Path
from types import TracebackType

from sparsify.durable import asides, beside, discard, is_open_at, make_folders, move_new, sync, try_lock
from sparsify.errors import BackendError

_LOCK = "sparsify-lock"


class Claim:
    """That this job alone writes ``out``, until it is released. Use as a context manager.

    Args:
        warn: of a filesystem that knows no locks.

    Raises:
        BackendError: another job writes it. OSError: the folder that ``out`` is to lie in cannot be written.
    """

    def __init__(self, out: Path, *, warn: bool = True) -> None:
        self.out = out.absolute()
        self._lock = beside(self.out, _LOCK)
        make_folders(self.out.parent)
        fd, sure = _take(self._lock, self.out)
        # Closes it also where nobody does.
        self._close = weakref.finalize(self, os.close, fd)
        if sure:
            _settle(self.out)
        elif warn:
            warnings.warn(
                f"{self.out.parent} is on a filesystem without locks: two jobs on one output are not told from each "
                "other, and what a killed one leaves is for you to remove",
                RuntimeWarning,
                stacklevel=2,
            )

    def release(self) -> None:
        """Let others write it. A second call does nothing."""
        if self._close.alive:
            try:
                # While it is held: whoever waits for the same file finds that it is gone and takes a new one.
                self._lock.unlink(missing_ok=True)
            finally:
                self._close()

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Scratch(tempfile.TemporaryDirectory[str]):
    """A temporary folder; those of processes that were killed go when the next one is made."""

    def __init__(self, name: str) -> None:
        try:
            place = tempfile.gettempdir()
        except OSError as error:
            raise BackendError(
                "a temporary folder", found=str(error.strerror or error), do="Name one in TMPDIR"
            ) from error
        for left in Path(place).glob(f"{name}-*"):
            _discard_dead(left)
        while True:
            super().__init__(prefix=f"{name}-")
            # Until it is locked, another process may take it for a dead one's.
            try:
                fd = os.open(self.name, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            weakref.finalize(self, os.close, fd)
            if try_lock(fd) is not False and is_open_at(fd, Path(self.name)):
                return


def _take(lock: Path, out: Path) -> tuple[int, bool]:
    """The open lock, and whether the filesystem knows locks."""
    flags = os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        try:
            # For writing: NFS locks no other.
            fd = os.open(lock, flags | os.O_RDWR, 0o666)
        except PermissionError:
            # Another user's, who died.
            fd = os.open(lock, flags | os.O_RDONLY, 0o666)
        held = try_lock(fd)
        if held and not is_open_at(fd, lock):
            os.close(fd)
            continue
        if held is False:
            os.close(fd)
            raise BackendError(
                f"output {out}",
                found="another job is writing it now",
                do="Wait until that is done, or choose another place with -o",
            )
        return fd, held is not None


def _settle(out: Path) -> None:
    """Of the owner of ``out``: nobody else can be at work there."""
    for left in asides(out):
        if not left.is_dir() or left.is_symlink():
            continue
        if f"{beside(out, 'replaced')}-" in str(left) and not os.path.lexists(out):
            move_new(left, out)
            sync(out.parent)
            warnings.warn(
                f"{out}: a job was killed while it replaced this output; the older one is back in its place",
                RuntimeWarning,
                stacklevel=4,
            )
        else:
            discard(left)


def _discard_dead(folder: Path) -> None:
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_DIRECTORY)
    except OSError:
        return
    try:
        if os.fstat(fd).st_uid == os.getuid() and try_lock(fd) and is_open_at(fd, folder):
            discard(folder)
    finally:
        os.close(fd)
