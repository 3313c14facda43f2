"""What became of one tensor of the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsify.backends.onnx.storage.pack import Format


@dataclass(frozen=True)
class StoredWeight:
    """One tensor of the checkpoint in the graph: how it is stored, in how many bytes, and at what price.

    ``checksum`` is the CRC-32 of its dense bytes in ``dtype`` and the checkpoint's layout; None where it is a link.
    ``transposed``: the file holds the other layout.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    format: Format
    nbytes: int
    dense_bytes: int
    unpacking: int = 0
    checksum: int | None = None
    transposed: bool = False
