"""Output folders that appear whole or not at all.

Work happens in a hidden sibling of the output, closed to others, which one call turns into the output at the end. A
process that dies leaves only hidden things; the next run to the same output puts them right (:mod:`.ownership`).
"""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path
from types import TracebackType

from sparsify.durable import aside, discard, exchange, move_new, sync, sync_tree
from sparsify.errors import BackendError
from sparsify.files.companions import is_model
from sparsify.files.modes import carry_modes, set_mode
from sparsify.files.ownership import Claim
from sparsify.files.reading import kind_at
from sparsify.words import format_bytes

# What says of a folder that it is an output of ours or a model, beside ONNX files and a model's config.json: manifests,
# tables of compare, adapters, the state of a tuning run.
_MARKS = ("sparsify.json", "compare.json", "sensitivity.json", "adapter_config.json", "state.safetensors")


class Staging:
    """A folder under construction for ``out``; use as a context manager and call :meth:`commit` last.

    Args:
        source: a folder that must not be touched: ``out`` may not be it, nor hold it, nor lie in it.
        like: the folder whose files' modes the output carries; ``source`` where None.
        need: bytes that will be written, checked against the free space before anything is.
        claim: of an owner of ``out`` who keeps it.

    Raises:
        BackendError: ``out`` exists (without ``overwrite``, or is neither empty nor what an output or a model is), is
            a file, is written by another job, has no room or cannot be made.
    """

    def __init__(
        self,
        out: Path,
        *,
        overwrite: bool = False,
        source: Path | None = None,
        like: Path | None = None,
        need: int = 0,
        claim: Claim | None = None,
    ) -> None:
        self.out, self.overwrite = out.absolute(), overwrite
        self._like = like if like is not None else source
        _check_place(self.out, source)
        self.folder = aside(self.out, "partial")
        try:
            self._claim, self._lent = claim or Claim(self.out), claim is not None
            try:
                # Only now: an older output may have come back to its place.
                check_free(self.out, overwrite=overwrite)
                _check_room(self.out, need)
                self.folder.mkdir()
                self._mode = stat.S_IMODE(self.folder.stat().st_mode)
                set_mode(self.folder, self._mode & ~0o077)
            except BaseException:
                self._release()
                raise
        except OSError as error:
            raise BackendError(
                f"output {out}", found=f"cannot be made ({error})", do="Choose another place with -o"
            ) from error

    def commit(self) -> Path:
        """Make the output appear, replacing an older one, and return its path: on the disk when this returns.

        Raises:
            BackendError: it cannot be put there, or something else has come there meanwhile. The older one stays.
        """
        try:
            carry_modes(self._like, self.folder, self._mode)
            sync_tree(self.folder)
            old = self._put_in_place()
            sync(self.out.parent)
        except FileExistsError as error:
            raise BackendError(
                f"output {self.out}",
                found="another job has put one there meanwhile",
                do="Look at that one, pass --overwrite to replace it, or choose another place with -o",
            ) from error
        except OSError as error:
            raise BackendError(
                f"output {self.out}",
                found=f"cannot be put in place ({error})",
                do="Choose another place with -o",
            ) from error
        discard(old)
        return self.out

    def _put_in_place(self) -> Path:
        """Where the older output lies now, if there was one."""
        try:
            move_new(self.folder, self.out)
            return self.folder
        except FileExistsError:
            if not self.overwrite:
                raise
        _check_kind(self.out)
        check_free(self.out, overwrite=True)
        if exchange(self.folder, self.out):
            return self.folder
        # Two steps; who is killed between them leaves the older one to be moved back by the next.
        old = aside(self.out, "replaced")
        self.out.rename(old)
        sync(self.out.parent)
        try:
            move_new(self.folder, self.out)
        except BaseException:
            move_new(old, self.out)
            raise
        return old

    def _release(self) -> None:
        if not self._lent:
            self._claim.release()

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        discard(self.folder)
        self._release()
        if isinstance(error, OSError):
            raise BackendError(
                f"output {self.out}", found=f"writing failed ({error})", do="No output was left; see the cause"
            ) from error


def check_output(out: Path, *, overwrite: bool, source: Path | None) -> Claim | None:
    """Whether ``out`` may be written without losing anything that the user did not offer, and can be at all.

    What killed jobs left there is put right first: an older output may be back.

    Returns:
        that this job alone writes ``out``, until it is released, which has to be before :class:`Staging`; None where
        the folder that it lies in is not there yet.

    Raises:
        BackendError: as :class:`Staging`, before any work; of the room alone nothing is known yet.
    """
    out = out.absolute()
    _check_place(out, source)
    try:
        claim = Claim(out, warn=False) if out.parent.is_dir() else None
        if claim is None:
            _try_parents(out)
    except OSError as error:
        raise BackendError(
            f"output {out}", found=f"cannot be made ({error})", do="Choose another place with -o"
        ) from error
    try:
        check_free(out, overwrite=overwrite)
    except BaseException:
        if claim is not None:
            claim.release()
        raise
    return claim


def _try_parents(out: Path) -> None:
    """Raise OSError unless the folder that ``out`` is to lie in can be made. Nothing is left of the attempt."""
    first = next(path for path in (out, *out.parents) if os.path.lexists(path.parent))
    trial = aside(first, "partial")
    trial.mkdir()
    trial.rmdir()


def _check_place(out: Path, source: Path | None) -> None:
    _check_kind(out)
    if source is None:
        return
    one, other = out.resolve(), source.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise BackendError(
            f"output {out}",
            found=f"it is, holds or lies in the source {source}",
            do="The source is never written; choose another place with -o",
        )


def _check_kind(out: Path) -> None:
    try:
        # What is not UTF-8 some of those who write and read files take for no name.
        str(out).encode()
        there = out.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        raise BackendError(
            f"output {out}", found=f"no name for a folder ({error})", do="Choose another name with -o"
        ) from error
    if not stat.S_ISDIR(there):
        raise BackendError(f"output {out}", found="a file or a link of that name", do="Choose another name with -o")


def check_free(out: Path, *, overwrite: bool) -> None:
    """Raise BackendError if something is at ``out``: with ``overwrite`` if that is no output of ours and no model."""
    if not out.exists():
        return
    if not overwrite:
        raise BackendError(
            f"output {out}",
            found="it exists already",
            do="Pass --overwrite to replace it, or choose another -o",
        )
    if (names := _not_ours(out)) is not None:
        raise BackendError(
            f"replacing {out}",
            found=f"a folder with {names} in it, and nothing by which it is an output of sparsify or a model",
            do="If nothing in it is needed, delete it yourself; or choose another place with -o",
        )


def _not_ours(folder: Path) -> str | None:
    """What is in a folder that is neither empty nor an output of ours or a model; None of those that are."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        return f"what cannot be seen ({error.strerror})"
    ours = any(name in _MARKS or name.endswith(".onnx") for name in names if kind_at(folder / name) == "file")
    if not names or ours or is_model(folder / "config.json"):
        return None
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_room(out: Path, need: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if free < need:
        raise BackendError(
            f"output {out}",
            found=f"{format_bytes(free)} free, {format_bytes(need)} needed",
            do="Free some space or choose another place with -o",
        )
