"""Named tensors: what parameters are read from and written to."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sparsify.errors import CheckpointError


class TensorStore(Protocol):
    """Named tensors that can be read one at a time and, where the store says so, replaced."""

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> torch.Size: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str) -> Tensor: ...

    def write(self, name: str, tensor: Tensor) -> None: ...


@runtime_checkable
class DenseView(Protocol):
    """A store that gives dense what lies otherwise in its folder, and says how the folder's config.json reads then."""

    def dense_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """The content of a config.json without what speaks of how the weights lie."""
        ...


class MemoryStore:
    """Tensors held in memory over a store that is only read: what a compile without an output writes to.

    They may be those of a module on a GPU; like those of a file they are read on the CPU.
    """

    def __init__(self, base: TensorStore | None, tensors: Mapping[str, Tensor] | None = None) -> None:
        self.base = base
        self.tensors: dict[str, Tensor] = dict(tensors or {})

    def names(self) -> Iterable[str]:
        own = dict.fromkeys(self.tensors)
        return own if self.base is None else dict.fromkeys(self.base.names()) | own

    def shape(self, name: str) -> torch.Size:
        return self.tensors[name].shape if name in self.tensors else self._base().shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype if name in self.tensors else self._base().dtype(name)

    def read(self, name: str) -> Tensor:
        return self.tensors[name].cpu() if name in self.tensors else self._base().read(name)

    def write(self, name: str, tensor: Tensor) -> None:
        self.tensors[name] = tensor.detach().clone()

    def _base(self) -> TensorStore:
        assert self.base is not None, "a store without a base holds every tensor itself"
        return self.base


class SpilledStore(MemoryStore):
    """The same, what is written kept in files of ``folder`` and mapped: memory that the system can have back."""

    def __init__(self, base: TensorStore | None, folder: Path) -> None:
        super().__init__(base)
        self._folder = folder

    def write(self, name: str, tensor: Tensor) -> None:
        if not tensor.numel():
            super().write(name, tensor)
            return
        # A new file each time: whoever still reads the old one has it.
        path = self._folder / f"{uuid.uuid4().hex}.bin"
        tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tofile(path)
        found = torch.from_file(str(path), shared=False, size=tensor.numel(), dtype=tensor.dtype)
        self.tensors[name] = found.view(tensor.shape)


class RenamedStore:
    """The tensors of a store under other names, only read.

    Args:
        names: the new name of each to the one that ``base`` has for it.
    """

    def __init__(self, base: TensorStore, names: Mapping[str, str]) -> None:
        self.base, self._named = base, dict(names)

    def names(self) -> Iterable[str]:
        return self._named

    def shape(self, name: str) -> torch.Size:
        return self.base.shape(self._named[name])

    def dtype(self, name: str) -> torch.dtype:
        return self.base.dtype(self._named[name])

    def read(self, name: str) -> Tensor:
        return self.base.read(self._named[name])

    def write(self, name: str, tensor: Tensor) -> None:
        raise CheckpointError(f"writing {name}", found="a source", do="Write to an output")

    def dense_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """See :class:`DenseView`."""
        return self.base.dense_config(config) if isinstance(self.base, DenseView) else config
