"""Tensors into safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


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
