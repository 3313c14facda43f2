"""Where the tensors of a GGUF file lie, and its metadata but for long lists.

A walk of our own goes before the libraries', which believe every count: theirs of 2^60 never ends. Source: docs/gguf.md
of ggml (versions 2 and 3, little endian).
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsify.errors import CheckpointError
from sparsify.files.reading import admit

_MAGIC, _VERSIONS, _ALIGNMENT = b"GGUF", (2, 3), 32
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
MAX_TENSORS, MAX_DIMENSIONS, MAX_NAME = 1 << 20, 4, 1 << 16


@dataclass(frozen=True)
class Entry:
    """A tensor: its shape as torch has it, ggml's number of its type, and where its bytes begin."""

    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True)
class Header:
    """``metadata`` without the content of lists, whose lengths it has; ``tensors`` in the file's order."""

    path: Path
    size: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Entry]


def read_header(path: Path) -> Header:
    """Read what stands before the tensors of ``path``.

    Raises:
        CheckpointError: no regular file, not GGUF, or truncated or damaged in what stands before the tensors.
    """
    size = admit(path).stat().st_size
    try:
        if size < 24:
            raise ValueError(f"{size} bytes")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Walk(path, data, size).header()
    except (ValueError, struct.error, OSError, OverflowError) as error:
        raise CheckpointError(
            f"file {path}", found=f"not a sound GGUF file ({error})", do="Fetch it again; it may be truncated"
        ) from error


class _Walk:
    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size, self.at = path, data, size, 4

    def header(self) -> Header:
        if self.data[:4] != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        version, count, pairs = self._take("I"), self._take("Q"), self._take("Q")
        if version not in _VERSIONS:
            raise ValueError(f"version {version}; read are {' and '.join(map(str, _VERSIONS))}")
        if count > MAX_TENSORS:
            raise ValueError(f"{count} tensors, more than {MAX_TENSORS}")
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._text(MAX_NAME)
            metadata[key] = self._value(self._take("I"))
        tensors = {}
        for _ in range(count):
            name, number = self._text(MAX_NAME), self._take("I")
            if number > MAX_DIMENSIONS or name in tensors:
                raise ValueError(f"tensor {name!r} twice, or of {number} dimensions")
            shape = tuple(self._take("Q") for _ in range(number))[::-1]
            kind, start = self._take("I"), self._take("Q")
            if math.prod(shape) > 64 * self.size:
                raise ValueError(f"tensor {name!r} of the shape {list(shape)} in {self.size} bytes")
            tensors[name] = Entry(shape, kind, start)
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"alignment {alignment!r}")
        begin = -(-self.at // alignment) * alignment
        placed = {name: Entry(e.shape, e.kind, begin + e.start) for name, e in tensors.items()}
        return Header(self.path, self.size, metadata, placed)

    def _take(self, form: str) -> Any:
        (value,) = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return value

    def _text(self, most: int) -> str:
        length = self._take("Q")
        if length > min(most, self.size - self.at):
            raise ValueError(f"a text of {length} bytes at {self.at} of {self.size}")
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8")

    def _value(self, kind: int) -> Any:
        """A value; of an array its length."""
        if kind in _SCALARS:
            return self._take(_SCALARS[kind])
        if kind == _STRING:
            return self._text(self.size)
        if kind != _ARRAY:
            raise ValueError(f"metadata of type {kind}")
        inner, length = self._take("I"), self._take("Q")
        if inner in _SCALARS:
            self.at += length * struct.calcsize(f"<{_SCALARS[inner]}")
        elif inner != _STRING:
            raise ValueError(f"an array of type {inner}")
        elif length > self.size:
            raise ValueError(f"an array of {length} texts in {self.size} bytes")
        else:
            for _ in range(length):
                # (Not in one line: the place is read before the length.)
                text = self._take("Q")
                self.at += text
        if self.at > self.size:
            raise ValueError(f"it ends at {self.size} bytes, within an array")
        return length
