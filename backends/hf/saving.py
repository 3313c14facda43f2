"""Tensors into safetensors files, and the bytes that lie there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sparsify.files.checkpoint import Checkpoint

_CHUNK = 16 << 20


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write ``tensors`` to ``path``, each in memory of its own: safetensors refuses shared memory."""
    first: dict[int, str] = {}
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if first.setdefault(tensor.data_ptr(), name) == name or not tensor.numel():
            own[name] = tensor
        else:
            own[name] = tensor.clone(memory_format=torch.contiguous_format)
    save_file(own, path, metadata={"format": "pt"})


def same_bytes(one: Checkpoint, other: Checkpoint, name: str) -> bool:
    """Whether tensor ``name`` lies in both, bit for bit."""
    path, start, size = one.span(name)
    other_path, other_start, other_size = other.span(name)
    if size != other_size:
        return False
    with path.open("rb") as a, other_path.open("rb") as b:
        a.seek(start)
        b.seek(other_start)
        left = size
        while left:
            part = min(left, _CHUNK)
            if a.read(part) != b.read(part):
                return False
            left -= part
    return True
