"""What became of one tensor of the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from sparsify.backends.onnx.storage.pack import Format


@dataclass(frozen=True)
class StoredWeight:
    """One tensor of the checkpoint in the graph: how it is stored, in how many bytes, and at what price.

    ``digest`` is that of its dense bytes in ``dtype`` and the checkpoint's layout; None where it is a link.
    ``transposed``: the file holds the other layout.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    format: Format
    nbytes: int
    dense_bytes: int
    unpacking: int = 0
    digest: str | None = None
    transposed: bool = False


def digests_of(stored: Iterable[StoredWeight]) -> dict[str, str]:
    """The digest of every weight that is not a link."""
    return {weight.name: weight.digest for weight in stored if weight.digest is not None}


def transposed(stored: Iterable[StoredWeight]) -> list[str]:
    """The names of those that the file holds the other way round."""
    return [weight.name for weight in stored if weight.transposed]
