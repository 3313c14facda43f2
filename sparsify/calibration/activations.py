"""Where activations wait between regions: in memory up to a budget, past it in an unlinked file."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsify.tensors import read_into, write_from

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class _Spilled:
    offset: int
    shape: torch.Size
    dtype: torch.dtype
    size: int


class ActivationStore:
    """Values of live nodes per batch, of which at most ``budget`` bytes lie in memory.

    Past the budget a value is written to a temporary file that has no name, so that nothing is left behind
    however the process ends. Space in the file is reused by values of the same size.
    """

    def __init__(self, budget: int, folder: Path | None = None) -> None:
        self.budget = budget
        self.held = 0
        self.spilled = 0
        self._folder = folder
        self._values: dict[tuple[int, str], Tensor | _Spilled | object] = {}
        self._free: dict[int, list[int]] = {}
        self._file: int | None = None
        self._end = 0

    def put(self, batch: int, name: str, value: object) -> None:
        """Keep ``value``; anything but a tensor is small and stays in memory."""
        if isinstance(value, Tensor):
            tensor = value.detach().cpu()
            size = tensor.numel() * tensor.element_size()
            if self.held + size > self.budget:
                self._values[batch, name] = self._spill(tensor, size)
                return
            self.held += size
            value = tensor
        self._values[batch, name] = value

    def take(self, batch: int, name: str, device: torch.device, *, keep: bool = False) -> object:
        """Return a value; unless ``keep``, the store forgets it."""
        value = self._values[batch, name] if keep else self._values.pop((batch, name))
        if isinstance(value, _Spilled):
            tensor = torch.empty(value.shape, dtype=value.dtype)
            assert self._file is not None
            read_into(self._file, tensor, value.offset)
            if not keep:
                self._free.setdefault(value.size, []).append(value.offset)
            return tensor.to(device)
        if isinstance(value, Tensor):
            if not keep:
                self.held -= value.numel() * value.element_size()
            return value.to(device)
        return value

    def _spill(self, tensor: Tensor, size: int) -> _Spilled:
        if self._file is None:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                self._file = os.dup(file.fileno())
        places = self._free.get(size)
        offset = places.pop() if places else self._end
        self._end = max(self._end, offset + size)
        write_from(self._file, tensor.contiguous(), offset)
        self.spilled = max(self.spilled, self._end)
        return _Spilled(offset, tensor.shape, tensor.dtype, size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._values.clear()
        if self._file is not None:
            os.close(self._file)
            self._file = None
