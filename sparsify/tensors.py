"""Tensors as bytes of a file: plain positioned reads and writes.

Not memory maps: mapped pages would count as resident memory of this process.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Collection
from io import RawIOBase
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor

# The kernel moves at most 2 GiB in one call.
_AT_ONCE = 1 << 30
# Small enough to stay in a core's cache between reading and hashing.
_PIECE = 1 << 20

# A number's bits, by its bytes.
_WHOLE_NUMBERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# How the bytes of a tensor or a file are told from others.
BLAKE: Final = "blake2b-256"
CRC: Final = "crc-32"


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable, without a copy."""
    if not tensor.numel():
        return memoryview(b"")
    array = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array.data)


def read_into(fd: int, tensor: Tensor, offset: int) -> None:
    """Fill ``tensor`` with the bytes of the file at ``offset``.

    Raises:
        EOFError: the file ends before the tensor is full.
    """
    view, done = as_bytes(tensor), 0
    while done < len(view):
        moved = os.preadv(fd, [view[done : done + _AT_ONCE]], offset + done)
        if moved == 0:
            raise EOFError(f"{len(view) - done} bytes are missing")
        done += moved


def write_from(fd: int, tensor: Tensor, offset: int) -> None:
    """Write the bytes of a contiguous CPU tensor to the file at ``offset``."""
    view, done = as_bytes(tensor), 0
    while done < len(view):
        done += os.pwritev(fd, [view[done : done + _AT_ONCE]], offset + done)


class Watcher(Protocol):
    """What takes bytes piece by piece."""

    def update(self, data: Any, /) -> None: ...


class Hash(Watcher, Protocol):
    """What then says, in hexadecimal, which they were."""

    def hexdigest(self) -> str: ...


class Crc32:
    """CRC-32 as a :class:`Hash`: what manifests of format 1 hold."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: Any, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


def new_hash(algorithm: str = BLAKE) -> Hash:
    """A fresh hash: BLAKE2b of 256 bits, or CRC-32."""
    return Crc32() if algorithm == CRC else hashlib.blake2b(digest_size=32)


def digest(tensor: Tensor, algorithm: str = BLAKE) -> str:
    """The digest of the bytes of ``tensor``, row by row, in its dtype."""
    whole = new_hash(algorithm)
    whole.update(as_bytes(tensor.contiguous()))
    return whole.hexdigest()


def digest_of_span(path: Path, start: int = 0, size: int | None = None, algorithm: str = BLAKE) -> str:
    """The digest of ``size`` bytes of a file from ``start`` on (None: of all that follow), read in pieces.

    Raises:
        EOFError: the file ends before.
    """
    whole = new_hash(algorithm)
    show_span(path, start, size, whole)
    return whole.hexdigest()


def show_span(path: Path, start: int, size: int | None, to: Watcher) -> None:
    """Show ``to`` the same bytes.

    Raises:
        EOFError: the file ends before.
    """
    piece = memoryview(bytearray(_PIECE if size is None else min(size, _PIECE)))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while size is None or size:
            count = file.readinto(piece if size is None else piece[: min(size, _PIECE)])
            if not count:
                if size is None:
                    break
                raise EOFError(f"{size} bytes are missing")
            to.update(piece[:count])
            size = None if size is None else size - count


def copy_span(source: RawIOBase, target: RawIOBase, size: int, seen_by: Collection[Watcher] = ()) -> None:
    """Copy ``size`` bytes from where ``source`` is to where ``target`` is, and show them to ``seen_by`` on the way.

    Raises:
        EOFError: the source ends before.
    """
    piece = memoryview(bytearray(min(size, _PIECE)))
    while size:
        count = source.readinto(piece[: min(size, _PIECE)])
        if not count:
            raise EOFError(f"{size} bytes are missing")
        for each in seen_by:
            each.update(piece[:count])
        done = 0
        while done < count:
            done += target.write(piece[done:count]) or 0
        size -= count


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same, NaN too; 0.0 and -0.0 are the same."""
    if one.shape != other.shape:
        return False
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


def zeroed(values: Tensor, mask: Tensor) -> Tensor:
    """``values`` with +0 where ``mask``, of the same shape, is True.

    That is ``masked_fill(mask, 0)``, by bits: torch does it one number at a time on CPUs.
    """
    whole = as_whole_numbers(values)
    return whole.bitwise_and(mask.to(whole.dtype).sub_(1)).view(values.dtype)


def as_whole_numbers(values: Tensor) -> Tensor:
    """The bits of ``values``, number by number, of the same shape; +0 is 0, and -0 is not. No copy."""
    return values.view(_WHOLE_NUMBERS[values.element_size()])


def all_finite(values: Tensor) -> bool:
    """Whether all of ``values`` are finite. A sum of finite numbers may overflow; only then is each looked at."""
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    return bool(values.sum(dtype=dtype).isfinite()) or bool(values.isfinite().all())
