"""Where activations wait between regions: in memory up to a budget, the GPU's first, past it in an unlinked file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsify.errors import BackendError
from sparsify.host import free_memory
from sparsify.tensors import read_into, write_from

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class _Spilled:
    offset: int
    shape: torch.Size
    dtype: torch.dtype
    size: int


# Of a GPU's free memory each store may take this part: three may stand side by side, and a region needs the rest.
_PART = 4


class ActivationStore:
    """Values of live nodes per batch, of which at most ``budget`` bytes lie in memory.

    Past the budget a value is written to a temporary file that has no name, so that nothing is left behind
    however the process ends. Space in the file is reused by values of the same size.

    Args:
        device: where values come from and go to. While a GPU has room they stay there: to the CPU's memory and back
            takes longer than most regions take to run.
    """

    def __init__(self, budget: int, device: torch.device | None = None, folder: Path | None = None) -> None:
        self.budget = budget
        self.held = 0
        self.spilled = 0
        memory = None if device is None else free_memory(device)
        # Bytes that more values may take on the GPU.
        self.room = 0 if memory is None else min(budget, memory[0] // _PART)
        self._folder = folder
        self._values: dict[tuple[int, str], Tensor | _Spilled | object] = {}
        self._free: dict[int, list[int]] = {}
        self._file: int | None = None
        self._end = 0

    def put(self, batch: int, name: str, value: object) -> None:
        """Keep ``value``, in the place of what was kept by that name; anything but a tensor is small and stays in
        memory."""
        self._free_place(self._values.pop((batch, name), None))
        if isinstance(value, Tensor):
            tensor = value.detach()
            size = _size(tensor)
            if not tensor.is_cpu and size <= self.room and self.held + size <= self.budget:
                self.room -= size
            else:
                tensor = tensor.cpu()
                size = _size(tensor)
                if self.held + size > self.budget:
                    self._values[batch, name] = self._spill(tensor, size)
                    return
            self.held += size
            value = tensor
        self._values[batch, name] = value

    def take(self, batch: int, name: str, device: torch.device, *, keep: bool = False) -> object:
        """Return a value; unless ``keep``, the store forgets it."""
        value = self._values[batch, name] if keep else self._values.pop((batch, name))
        found: object = value
        if isinstance(value, _Spilled):
            tensor = torch.empty(value.shape, dtype=value.dtype)
            assert self._file is not None
            read_into(self._file, tensor, value.offset)
            found = tensor
        if not keep:
            self._free_place(value)
        return found.to(device) if isinstance(found, Tensor) else found

    def all_of(self) -> Iterator[tuple[int, str, object]]:
        """Everything that is kept: of which batch, its name, and the value, which stays; tensors on the CPU."""
        for batch, name in sorted(self._values):
            yield batch, name, self.take(batch, name, torch.device("cpu"), keep=True)

    def _free_place(self, value: object) -> None:
        """What ``value`` took is free for others."""
        if isinstance(value, _Spilled):
            self._free.setdefault(value.size, []).append(value.offset)
        elif isinstance(value, Tensor):
            self.held -= _size(value)
            self.room += 0 if value.is_cpu else _size(value)

    def _spill(self, tensor: Tensor, size: int) -> _Spilled:
        try:
            return self._write(tensor, size)
        except OSError as error:
            raise BackendError(
                f"activations in the temporary folder {self._folder or tempfile.gettempdir()}",
                found=f"cannot be written ({error.strerror or error})",
                do="Free some space there, name another with TMPDIR, or give more --memory",
            ) from error

    def _write(self, tensor: Tensor, size: int) -> _Spilled:
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


def _size(tensor: Tensor) -> int:
    """Bytes that keeping ``tensor`` takes: on a GPU all that it may be a part of, for that is not given back."""
    return tensor.numel() * tensor.element_size() if tensor.is_cpu else tensor.untyped_storage().nbytes()
