"""Output folders that appear whole or not at all.

Work happens in a hidden sibling of the output, which one rename turns into the output at the end. A process that
dies leaves only the hidden folder; the next run to the same output removes it.
"""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path
from types import TracebackType

from sparsify.errors import BackendError
from sparsify.files.checkpoint import Checkpoint


class Staging:
    """A folder under construction for ``out``; use as a context manager and call :meth:`commit` last.

    Args:
        source: a folder that must not be touched: ``out`` may not be it, nor hold it, nor lie in it.
        need: bytes that will be written, checked against the free space before anything is.

    Raises:
        BackendError: ``out`` exists (without ``overwrite``), is a file, has no room or cannot be made.
    """

    def __init__(self, out: Path, *, overwrite: bool = False, source: Path | None = None, need: int = 0) -> None:
        self.out = out.absolute()
        check_output(self.out, overwrite=overwrite, source=source)
        self.folder = self.out.parent / f".{self.out.name}.partial-{socket.gethostname()}-{os.getpid()}"
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._remove_stale()
            free = shutil.disk_usage(self.out.parent).free
            if free < need:
                raise BackendError(
                    f"output {out}",
                    found=f"{free / 1e9:.2f} GB free, {need / 1e9:.2f} GB needed",
                    do="Free some space or choose another place with -o",
                )
            self.folder.mkdir()
        except OSError as error:
            raise BackendError(
                f"output {out}", found=f"cannot be made ({error})", do="Choose another place with -o"
            ) from error

    def _remove_stale(self) -> None:
        prefix = f".{self.out.name}.partial-{socket.gethostname()}-"
        for path in self.out.parent.glob(f"{prefix}*"):
            pid = path.name.removeprefix(prefix)
            if pid.isdigit() and (int(pid) == os.getpid() or not _alive(int(pid))):
                shutil.rmtree(path, ignore_errors=True)

    def commit(self) -> Path:
        """Make the output appear, replacing an older one, and return its path."""
        old = self.folder.with_name(self.folder.name.replace(".partial-", ".replaced-"))
        try:
            if self.out.exists():
                self.out.rename(old)
            self.folder.rename(self.out)
        except OSError as error:
            if old.exists() and not self.out.exists():
                old.rename(self.out)
            raise BackendError(
                f"output {self.out}",
                found=f"cannot be put in place ({error})",
                do="Choose another place with -o",
            ) from error
        shutil.rmtree(old, ignore_errors=True)
        return self.out

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise BackendError(
                f"output {self.out}", found=f"writing failed ({error})", do="Nothing was left; see the cause"
            ) from error


def check_output(out: Path, *, overwrite: bool, source: Path | None) -> None:
    """Raise BackendError unless ``out`` may be written without losing anything the user did not offer."""
    out = out.absolute()
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise BackendError(f"output {out}", found="a file or a link of that name", do="Choose another name with -o")
    if source is not None:
        one, other = out.resolve(), source.resolve()
        if one == other or one in other.parents or other in one.parents:
            raise BackendError(
                f"output {out}",
                found=f"it is, holds or lies in the source {source}",
                do="The source is never written; choose another place with -o",
            )
    if out.exists() and not overwrite:
        raise BackendError(
            f"output {out}",
            found="it exists already",
            do="Pass --overwrite to replace it, or choose another -o",
        )


def copy_checkpoint(source: Checkpoint, folder: Path) -> Checkpoint:
    """Copy the weight files of ``source`` (and its index) into ``folder`` and open them for patching."""
    for path in source.files:
        shutil.copyfile(path, folder / path.name)
    index = source.folder / "model.safetensors.index.json"
    if len(source.files) > 1 or next(iter(source.files)).name != "model.safetensors":
        shutil.copyfile(index, folder / index.name)
    return Checkpoint(folder, writable=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
