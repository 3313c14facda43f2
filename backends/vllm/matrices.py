"""The matrices that a layer waits for, and how one is made of the tensors that a checkpoint has of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from sparsify.backends.packed.format import PackedSite
from sparsify.errors import CheckpointError
from sparsify.runtime.layout import Packed
from sparsify.runtime.shard import columns_of, rows_of
from sparsify.runtime.soundness import check

# Every tensor that a packed parameter may have in a file, by what follows its name.
PARTS = {"": None, "_meta": torch.uint8, "_mask": torch.int32, "_integers": torch.int8}


class Awaited(Protocol):
    """One matrix [rows, columns] of a checkpoint."""

    @property
    def name(self) -> str:
        """Of its parameter."""

    @property
    def rows(self) -> int | None:
        """None: not known before it comes."""

    @property
    def tensors(self) -> Mapping[str, torch.dtype | None]:
        """What may come of it, by the name in its module; with the dtype (None: the layer's)."""

    def add(self, tensor_name: str, tensor: Tensor) -> Packed | Tensor | None:
        """The matrix, when it is complete.

        Raises:
            CheckpointError: a tensor that does not belong to it, or numbers that are none of its layout.
        """

    @property
    def missing(self) -> list[str]:
        """What did not come of it yet."""


@dataclass
class Site:
    """A parameter of a packed folder.

    Attributes:
        site: how it is packed; None: not at all. parts: what has come. turned: of how many heads vLLM's model turns the
            rows of the tensor ``weight`` before it comes, and of no other.
    """

    name: str
    site: PackedSite | None
    parts: dict[str, Tensor] = field(default_factory=dict)
    turned: int = 0

    @property
    def rows(self) -> int | None:
        return None if self.site is None else self.site.rows

    @property
    def tensors(self) -> Mapping[str, torch.dtype | None]:
        return {f"weight{part}": kind for part, kind in PARTS.items()}

    def add(self, tensor_name: str, tensor: Tensor) -> Packed | Tensor | None:
        part = tensor_name.removeprefix("weight")
        wanted = {""} if self.site is None else set(self.site.parts)
        if part not in wanted:
            raise CheckpointError(
                f"packed parameter {self.name}",
                found=f"a tensor {self.name}{part} that config.json knows nothing of",
                do="config.json and the weights do not belong together: fetch the folder again",
            )
        if self.turned and part:
            # As the model does: the two rows of a pair, one below the other, go into the two halves of a head.
            tensor = tensor.unflatten(0, (self.turned, -1, 2)).transpose(1, 2).flatten(0, 2)
        self.parts[part] = tensor
        if set(self.parts) != wanted:
            return None
        parts, self.parts = self.parts, {}
        return tensor if self.site is None else whole(self.name, self.site, parts)

    @property
    def missing(self) -> list[str]:
        wanted = [""] if self.site is None else list(self.site.parts)
        return [self.name + part for part in wanted if part not in self.parts]


def whole(name: str, site: PackedSite, parts: Mapping[str, Tensor]) -> Packed:
    """The packed matrix of a parameter, checked.

    Raises:
        CheckpointError: shapes and dtypes that are not those of ``site``, or numbers that are none of its layout.
    """
    found = {part: _as_stored(site, tensor, site.parts[part][0]) for part, tensor in parts.items()}
    for part, (shape, kind) in site.parts.items():
        tensor = found[part]
        if tuple(tensor.shape) != shape or (tensor.dtype != kind if kind else not tensor.is_floating_point()):
            raise CheckpointError(
                f"packed tensor {name}{part}",
                found=f"{list(tensor.shape)} of {tensor.dtype} where {list(shape)} of {kind or 'floats'} belong",
                do="config.json and the weights do not belong together: fetch the folder again",
            )
    packed = site.packed(found.__getitem__)
    check(name, packed)
    return packed


def _as_stored(site: PackedSite, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """GPT-2's weights are transposed in files, and vLLM turns what it reads of them: packed ones lie the right way."""
    if not site.transposed or tensor.dim() != 2:
        return tensor
    # What is read of a file is contiguous; a single column is so either way.
    turned = not tensor.is_contiguous() or tuple(tensor.shape) == shape[::-1] != shape
    return tensor.t() if turned else tensor


def fitting(name: str, found: Sequence[int], expected: Sequence[int]) -> None:
    """Check the shape of a matrix, or of a stack, against the model's.

    Raises:
        CheckpointError: it is another one.
    """
    if tuple(found) != tuple(expected):
        raise CheckpointError(
            f"packed parameter {name}",
            found=f"{list(found)} where the model has {list(expected)}",
            do="Do config.json and the weights belong to one model?",
        )


def lost(tensor: str) -> CheckpointError:
    """What is said of a tensor that has not come when everything has."""
    return CheckpointError(
        f"packed tensor {tensor}",
        found="the checkpoint does not hold it, or not all of it",
        do="Fetch the folder again",
    )


def rows_cut(matrix: Packed | Tensor, first: int, count: int) -> Packed | Tensor:
    """Rows [first, first + count): a copy, that holds on to nothing else."""
    return matrix[first : first + count].clone() if isinstance(matrix, Tensor) else rows_of(matrix, first, count)


def columns_cut(matrix: Packed | Tensor, first: int, count: int) -> Packed | Tensor:
    """Columns [first, first + count): a copy."""
    if isinstance(matrix, Tensor):
        return matrix[:, first : first + count].clone(memory_format=torch.contiguous_format)
    return columns_of(matrix, first, count)


def converted(matrix: Packed | Tensor, dtype: torch.dtype) -> Packed | Tensor:
    """In the dtype that the layer computes in."""
    if isinstance(matrix, Tensor):
        return matrix.to(dtype)
    if matrix.scales is not None:
        return replace(matrix, scales=matrix.scales.to(dtype))
    return replace(matrix, values=matrix.values.to(dtype))
