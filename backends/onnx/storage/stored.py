"""What became of one tensor of the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from sparsify.backends.onnx.storage.pack import FORMATS, Format, unpacking_bytes
from sparsify.runtime.layout import Packed
from sparsify.tensors import digest


@dataclass(frozen=True)
class StoredWeight:
    """One tensor of the checkpoint in the graph: how it is stored, in how many bytes, and at what price.

    ``digest`` is that of its dense bytes in ``dtype`` and the checkpoint's layout; None where it is a link.
    ``transposed``: the file holds the other layout. ``bits``: of its values, where they are integers. ``by_ours``:
    operators of ours read it.
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
    bits: int | None = None
    by_ours: bool = False


def stored_packed(name: str, tensor: Tensor, packed: Packed, compute: ir.DataType, *, transposed: bool) -> StoredWeight:
    """``tensor``, which the graph multiplies with in ``compute``, as our operators read it."""
    form = FORMATS[packed.layout]
    count, size = tensor.numel(), tensor.element_size()
    # What a runtime without our library needs to unpack it; of integers their numbers and scales are float32.
    need = unpacking_bytes(form, count, packed.values.numel(), int(compute.itemsize))
    need += 0 if packed.bits is None else 4 * 4 * count
    shape, found = tuple(tensor.shape), digest(tensor)
    return StoredWeight(
        name, shape, tensor.dtype, form, packed.nbytes, count * size, need, found, transposed, packed.bits, True
    )


def digests_of(stored: Iterable[StoredWeight]) -> dict[str, str]:
    """The digest of every weight that is not a link."""
    return {weight.name: weight.digest for weight in stored if weight.digest is not None}


def transposed(stored: Iterable[StoredWeight]) -> list[str]:
    """The names of those that the file holds the other way round."""
    return [weight.name for weight in stored if weight.transposed]
