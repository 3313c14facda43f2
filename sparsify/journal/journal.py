"""The journal of one job: a hidden folder beside its output, named by a digest of what was asked.

Everything that decides the numbers in the output is asked: weights, passes, data, seed, versions. What does not (where
activations lie, what the result is written as) may be another when the job goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from sparsify.durable import aside, beside, discard, is_open_at, make_folders, move_new, sync, try_lock, write_whole
from sparsify.errors import BackendError, CheckpointError, SpecError
from sparsify.journal.left import ASKED, UNFINISHED, Left, left_of
from sparsify.journal.record import Entry, Record
from sparsify.words import format_bytes

# Answers that are longer are not said.
_SHORT = 60
# What is asked, in words for people, and the answer.
Asked = Mapping[str, Any]


class Journal:
    """What a job has finished; nobody else goes on with it meanwhile. A context manager.

    Args:
        out: the output. asked: everything that decides what is written there.
        typed: the words of the command, by which the next one is known before anything is read; None where some of
            them are in memory alone.
        resume: go on with what is there, of this job; else there must be nothing.
        need: bytes that it is going to take.

    Raises:
        CheckpointError: nothing to go on with, or what another job left, or it is damaged.
        BackendError: this job was interrupted and is to begin anew; another process is at it; it cannot be written.
    """

    def __init__(
        self, out: Path, asked: Asked, *, typed: Mapping[str, Any] | None = None, resume: bool = False, need: int = 0
    ) -> None:
        self.out, self._asked = out.absolute(), asked
        name = hashlib.blake2b(_text(asked).encode(), digest_size=8).hexdigest()
        self.folder = beside(self.out, f"{UNFINISHED}-{name}")
        if resume and not (self.folder / ASKED).is_file():
            raise nothing_of(self.out, asked)
        try:
            self._open()
            try:
                self._begin(resume, need)
                if not (self.folder / ASKED).is_file():
                    told = {"output": str(self.out), "asked": asked, "typed": typed}
                    write_whole(self.folder / ASKED, _text(told).encode(), mode=0o600)
            except BaseException:
                self._close()
                raise
        except OSError as error:
            raise BackendError(
                f"output {out}",
                found=f"no journal can be kept beside it ({error})",
                do="Choose another place with -o, or pass --no-journal",
            ) from error

    def _begin(self, resume: bool, need: int) -> None:
        self.record = Record(self.folder)
        if self.record.entries and not resume:
            raise unfinished(next(left for left in left_of(self.out) if left.path == self.folder))
        self.record.cut()
        try:
            self._check_room(need)
        except BackendError:
            if not self.record.entries:
                discard(self.folder)
            raise

    def forget(self) -> None:
        """The output is in its place: the journal goes, at once."""
        gone = aside(self.out, "partial")
        # Somebody may have removed it since the last part.
        with contextlib.suppress(FileNotFoundError):
            move_new(self.folder, gone)
        discard(gone)
        self._close()

    def add(self, key: tuple[int, str], row: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Raises:
        BackendError: it cannot be written.
        """
        try:
            self.record.add(key, row, tensors)
        except OSError as error:
            raise BackendError(
                f"journal {self.folder}",
                found=f"cannot be written ({error})",
                do=f"What was finished before {key[1]} is kept: see to the cause and pass --resume",
            ) from error

    def _open(self) -> None:
        """Make the folder where there is none, and lock it."""
        make_folders(self.out.parent)
        while True:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            fd = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_DIRECTORY)
            held = try_lock(fd)
            if held is False:
                os.close(fd)
                raise BackendError(
                    f"output {self.out}",
                    found=f"another process is at this job now (journal {self.folder.name})",
                    do="Wait until that is done, or choose another place with -o",
                )
            # Until it was locked, another process may have taken it for a dead one's.
            if is_open_at(fd, self.folder):
                break
            os.close(fd)
        self._close = weakref.finalize(self, os.close, fd)
        sync(self.out.parent)

    def _check_room(self, need: int) -> None:
        free, need = shutil.disk_usage(self.folder).free, need - self.record.size
        if free < need:
            raise BackendError(
                f"journal of {self.out}",
                found=f"{format_bytes(free)} free, {format_bytes(need)} needed beside the output",
                do="Free some space, choose another place with -o, or pass --no-journal, which --resume cannot go on "
                "from",
            )

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._close.alive:
            return
        # Not those that this process knows of: it may have been interrupted once the line was there.
        left = next((left for left in left_of(self.out) if left.path == self.folder), None)
        # Words that cannot be meant will be others next time, and so will the job that they ask for.
        useless = isinstance(error, SpecError) and "passes" in self._asked
        if left is None or not left.finished or useless:
            discard(self.folder)
        elif error is not None and not isinstance(error, CheckpointError):
            # Which says itself what is to be done where the journal is damaged.
            warnings.warn(
                f"{left.finished} finished parts of this run are kept in {self.folder} "
                f"({format_bytes(left.size)}): the same command with --resume goes on from there, "
                f"`sparsify clean {self.out} --yes` removes them",
                RuntimeWarning,
                stacklevel=2,
            )
        self._close()


@dataclass(frozen=True)
class Kept:
    """What is kept of one pass, part by part. Without a journal nothing is.

    Attributes:
        every: after so many blocks activations are kept too (:mod:`sparsify.journal.reached`); 0 for never.
    """

    number: int = 0
    journal: Journal | None = None
    every: int = 0

    @property
    def begun(self) -> bool:
        """Whether a run before has finished a part of it."""
        return self.journal is not None and any(number == self.number for number, _ in self.journal.record.entries)

    def find(self, key: str) -> Entry | None:
        """What was finished under ``key`` by a run before."""
        return None if self.journal is None else self.journal.record.entries.get((self.number, key))

    def add(self, key: str, row: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Keep a part that is finished.

        Raises:
            BackendError: it cannot be written.
        """
        if self.journal is not None:
            self.journal.add((self.number, key), row, tensors)

    def subfolder(self, name: str) -> Path | None:
        """A new folder in the journal, in the place of one that was not finished; None without a journal."""
        if self.journal is None:
            return None
        folder = self.journal.folder / name
        discard(folder)
        folder.mkdir()
        return folder


NOT_KEPT = Kept()


def nothing_of(out: Path, asked: Asked, *, whole: bool = True) -> CheckpointError:
    """Why there is nothing of a job to go on with: what differs from the job that was interrupted, if one was."""
    others = [(_differing(left.asked, asked, whole), left) for left in left_of(out) if left.finished]
    if not others:
        return CheckpointError(
            f"resuming {out}", found="no interrupted run left anything there", do="Begin without --resume"
        )
    differing, left = min(others, key=lambda other: len(other[0]))
    return CheckpointError(
        f"resuming {out}",
        found=f"what was interrupted there ({left.path.name}) was asked otherwise: {'; '.join(differing)}",
        do=f"Ask the same again, or begin without --resume; sparsify clean {out} --yes removes what that one left",
    )


def look(out: Path, asked: Asked, typed: Mapping[str, Any] | None = None, *, resume: bool) -> None:
    """A look at what interrupted runs to ``out`` left, before anything is read; what others left is told.

    Args:
        asked: what is known by then. typed: see :class:`Journal`.

    Raises:
        CheckpointError, BackendError: as :class:`Journal`.
    """
    found = [left for left in left_of(out) if left.finished]
    if resume:
        if all(_differing(left.asked, asked, False) for left in found):
            raise nothing_of(out, asked, whole=False)
        return
    for left in found:
        if typed is not None and left.typed == typed:
            raise unfinished(left)
        if left.alive:
            continue
        warnings.warn(
            f"an earlier run to {left.out} was interrupted: {left.finished} finished parts ({format_bytes(left.size)}) "
            f"are kept in {left.path}; sparsify clean {left.out} --yes removes them",
            RuntimeWarning,
            stacklevel=3,
        )


def unfinished(left: Left) -> BackendError:
    """What is raised where a job was interrupted, and is to begin anew."""
    return BackendError(
        f"output {left.out}",
        found=f"this very job was interrupted: {left.finished} finished parts ({format_bytes(left.size)}) are kept in "
        f"{left.path}",
        do=f"Go on from there with --resume; or remove it with sparsify clean {left.out} --yes and begin anew",
    )


def _differing(before: Asked, now: Asked, whole: bool) -> list[str]:
    """What was asked otherwise, in words; of what ``now`` says alone, where that is not the whole."""
    found = []
    for what in {**before, **now} if whole else now:
        old, new = before.get(what), now.get(what)
        if _text(old) != _text(new):
            short = all(len(_said(value)) <= _SHORT for value in (old, new))
            found.append(f"{what} ({_said(old)}, now {_said(new)})" if short else what)
    return found


def _said(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(str(each) for each in value) or "none"
    return "none" if value is None else str(value)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
