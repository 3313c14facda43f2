"""Tensors in files beside a graph."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor

from sparsify.tensors import as_bytes, new_hash

DATA = "model.onnx.data"

TYPES = {
    torch.float64: ir.DataType.DOUBLE,
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32,
    torch.int16: ir.DataType.INT16,
    torch.int8: ir.DataType.INT8,
    torch.uint8: ir.DataType.UINT8,
    torch.bool: ir.DataType.BOOL,
}


class DataFile:
    """``model.onnx.data``: tensors one after the other, each written when it is known and then forgotten."""

    ALIGN = 64

    def __init__(self, path: Path) -> None:
        self.path, self.end, self._hash = path, 0, new_hash()

    def append(self, name: str, tensor: Tensor) -> ir.ExternalTensor:
        tensor = tensor.detach().cpu().contiguous()
        start = -(-self.end // self.ALIGN) * self.ALIGN
        size = tensor.numel() * tensor.element_size()
        with self.path.open("r+b" if self.path.exists() else "w+b") as file:
            file.truncate(start)
            file.seek(start)
            file.write(as_bytes(tensor))
        self._hash.update(bytes(start - self.end))
        self._hash.update(as_bytes(tensor))
        self.end = start + size
        return external(self.path, start, size, tensor.dtype, tuple(tensor.shape), name)

    def digests(self) -> dict[str, str]:
        """The digest of the whole file, as it was meant to be written, by its name; empty where there is none."""
        return {self.path.name: self._hash.hexdigest()} if self.end else {}


def external(
    path: Path, start: int, size: int, dtype: torch.dtype, shape: Sequence[int], name: str
) -> ir.ExternalTensor:
    """A tensor that lies in a file beside the graph."""
    return ir.ExternalTensor(
        path.name, start, size, TYPES[dtype], shape=ir.Shape(tuple(shape)), name=name, base_dir=str(path.parent)
    )
