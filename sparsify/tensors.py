"""Tensors as bytes of a file: plain positioned reads and writes.

Not memory maps: mapped pages would count as resident memory of this process.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import torch
from torch import Tensor

# The kernel moves at most 2 GiB in one call.
_AT_ONCE = 1 << 30
_PIECE = 16 << 20


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


def checksum(tensor: Tensor) -> int:
    """CRC-32 of the bytes of ``tensor``."""
    return zlib.crc32(as_bytes(tensor.contiguous()))


def checksum_of_span(path: Path, start: int, size: int) -> int:
    """CRC-32 of ``size`` bytes of a file from ``start`` on.

    Raises:
        EOFError: the file ends before.
    """
    total = 0
    with path.open("rb") as file:
        file.seek(start)
        while size:
            part = file.read(min(size, _PIECE))
            if not part:
                raise EOFError(f"{size} bytes are missing")
            total = zlib.crc32(part, total)
            size -= len(part)
    return total


def all_finite(values: Tensor) -> bool:
    """Whether all of ``values`` are finite. A sum of finite numbers may overflow; only then is each looked at."""
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    return bool(values.sum(dtype=dtype).isfinite()) or bool(values.isfinite().all())
