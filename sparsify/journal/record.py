"""Lines on the disk, and the tensors that they speak of: both are only ever added to, so that a kill at any moment
leaves a whole beginning.

A line is there once its tensors are: first their bytes are brought to the disk, then the line. Each begins with a
digest of the rest of it, so that one that was cut off, or changed, is known; the last one may be.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from sparsify.errors import CheckpointError
from sparsify.journal.left import LINES, out_of
from sparsify.tensors import digest, read_into, write_from

TENSORS = "tensors.bin"
Made = TypeVar("Made")
# (number of the pass, what of it).
Key = tuple[int, str]


@dataclass(frozen=True)
class Span:
    """Where a tensor lies."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    digest: str

    def as_list(self) -> list[Any]:
        """As a line has it; :func:`span_of` reads it."""
        return [str(self.dtype).removeprefix("torch."), list(self.shape), self.start, self.digest]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Entry:
    """One thing that is finished: what is told of it, and its tensors by their names."""

    folder: Path
    row: Mapping[str, Any]
    spans: Mapping[str, Span]

    def read(self, name: str) -> Tensor:
        """The tensor ``name``.

        Raises:
            CheckpointError: its bytes are not those that were written.
        """
        return read_span(self.folder / TENSORS, self.spans[name], name)

    def tensors(self) -> dict[str, Tensor]:
        return {name: self.read(name) for name in self.spans}

    def made(self, kind: type[Made], **others: Any) -> Made:
        """What is told of it as an object.

        Raises:
            CheckpointError: it is told otherwise.
        """
        try:
            return kind(**{**self.row, **others})
        except TypeError as error:
            raise damaged(self.folder, f"a line that is no {kind.__name__} ({error})") from error


def read_span(path: Path, span: Span, name: str) -> Tensor:
    """The tensor ``name`` that lies in the file ``path`` of a journal.

    Raises:
        CheckpointError: its bytes are not those that were written.
    """
    tensor = torch.empty(span.shape, dtype=span.dtype)
    try:
        with path.open("rb", buffering=0) as file:
            read_into(file.fileno(), tensor, span.start)
    except (OSError, EOFError) as error:
        raise damaged(path.parent, f"{name} cannot be read ({error})") from error
    if digest(tensor) != span.digest:
        raise damaged(path.parent, f"the bytes of {name} are not those that were written")
    return tensor


def span_to(tensor: Tensor, start: int) -> Span:
    """Where ``tensor``, contiguous and on the CPU, is going to lie."""
    return Span(tensor.dtype, tuple(tensor.shape), start, digest(tensor))


def damaged(folder: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"resuming from {folder}",
        found=found,
        do=f"Remove it (sparsify clean {out_of(folder)} --yes) and begin without --resume",
    )


class Record:
    """The lines and tensors in ``folder``, read when this is made.

    Raises:
        CheckpointError: a line that is not as it was written, but for the last; tensors that are missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[Key, Entry] = {}
        # Where the next line and the next tensor go: what lies behind was cut off.
        self._lines = self._tensors = 0
        self._read()

    def add(self, key: Key, row: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Keep ``row`` and ``tensors``: on the disk when this returns.

        Raises:
            OSError: they cannot be; what was there before still is.
        """
        spans, end = dict[str, Span](), self._tensors
        own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        if own:
            with _opened(self.folder / TENSORS) as fd:
                for name, tensor in own.items():
                    spans[name] = span_to(tensor, end)
                    write_from(fd, tensor, end)
                    end += spans[name].size
                os.fsync(fd)
        told = {name: span.as_list() for name, span in spans.items()}
        text = json.dumps({"pass": key[0], "key": key[1], "row": dict(row), "tensors": told})
        line = sealed_line(text)
        with _opened(self.folder / LINES) as fd:
            done = 0
            while done < len(line):
                done += os.pwrite(fd, line[done:], self._lines + done)
            os.fsync(fd)
        self._lines, self._tensors = self._lines + len(line), end
        self.entries[key] = Entry(self.folder, row, spans)

    @property
    def size(self) -> int:
        """Bytes of all of it."""
        return self._lines + self._tensors

    def cut(self) -> None:
        """Remove what was cut off behind the last whole line."""
        for name, end in ((LINES, self._lines), (TENSORS, self._tensors)):
            with _opened(self.folder / name) as fd:
                os.ftruncate(fd, end)

    def _read(self) -> None:
        try:
            content = (self.folder / LINES).read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise damaged(self.folder, f"{LINES} cannot be read ({error})") from error
        *whole, _ = content.split(b"\n")
        for number, line in enumerate(whole):
            text = text_of(line)
            if text is None:
                if number + 1 == len(whole):
                    break
                raise damaged(self.folder, f"line {number + 1} of {LINES} is not what was written")
            self._take(number, text)
            self._lines += len(line) + 1
        path = self.folder / TENSORS
        if (path.stat().st_size if path.exists() else 0) < self._tensors:
            raise damaged(self.folder, f"{TENSORS} was cut short")

    def _take(self, number: int, text: str) -> None:
        try:
            said = json.loads(text)
            spans = {name: span_of(*told) for name, told in said["tensors"].items()}
            key = int(said["pass"]), str(said["key"])
            self.entries[key] = Entry(self.folder, dict(said["row"]), spans)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise damaged(self.folder, f"line {number + 1} of {LINES} is none of ours ({error})") from error
        self._tensors = max([self._tensors, *(span.start + span.size for span in spans.values())])


class _opened:
    """A file that is open for writing."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> int:
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        return self._fd

    def __exit__(self, *error: object) -> None:
        os.close(self._fd)


def span_of(dtype: str, shape: list[int], start: int, sum: str) -> Span:
    """Raises:
    AttributeError, ValueError: no tensor.
    """
    kind = getattr(torch, dtype)
    if not isinstance(kind, torch.dtype) or any(type(n) is not int or n < 0 for n in (start, *shape)):
        raise ValueError(f"a tensor of {dtype} {shape} at {start}")
    return Span(kind, tuple(shape), start, str(sum))


def sealed_line(text: str) -> bytes:
    """``text``, of one line, behind its digest."""
    return f"{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()} {text}\n".encode()


def text_of(line: bytes) -> str | None:
    """What :func:`sealed_line` made ``line`` of, its end left out; None of any other."""
    text = line[33:].decode(errors="replace")
    return text if sealed_line(text) == line + b"\n" else None
