"""The weights of an ONNX file as a store of named tensors, packed ones unpacked as they are read."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor

from sparsify.backends.onnx.storage.datafile import TYPES
from sparsify.backends.onnx.storage.pack import Format, PackedTensor, unpack_tensor
from sparsify.errors import CheckpointError, first_line
from sparsify.tensors import read_into

_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
# Smaller ones are tables that the graph computes with.
_MATRIX = 256
_TORCH = {onnx: kind for kind, onnx in TYPES.items()}


class GraphStore:
    """Tensors of the graph ``file`` by name, read one at a time.

    ``packed`` maps the names of packed tensors to their formats; ``transposed`` are matrices that the file holds the
    other way round than the checkpoint, and that are read the checkpoint's way.

    Raises:
        CheckpointError: the file is no ONNX model, or data that it points to is missing or cut short.
    """

    def __init__(self, file: Path, transposed: Collection[str] = ()) -> None:
        self.file, self.transposed = file, frozenset(transposed)
        self.model = load_graph(file)
        self._initializers = dict(self.model.graph.initializers)
        self.packed: dict[str, Format] = {}
        self._shapes: dict[str, torch.Size] = {}
        for name in self._initializers:
            stem = name.removesuffix(".codes")
            if stem != name and f"{stem}.values" in self._initializers:
                self._note_packed(stem)

    def _note_packed(self, stem: str) -> None:
        reader = next(iter(self._initializers[f"{stem}.codes"].consumers()))
        value = next((n.outputs[0] for n in self.model.graph if n.outputs[0].name == stem), None)
        if value is None or value.shape is None or not value.shape.is_static():
            raise CheckpointError(f"{self.file}", found=f"{stem} is packed in an unknown way", do="Export it again")
        self.packed[stem] = "2:4" if reader.op_type == "BitShift" else "bitmask"
        self._shapes[stem] = torch.Size(int(n) for n in value.shape)

    def names(self) -> Iterable[str]:
        """Names of the weights that lie beside the graph, dense and packed."""
        parts = {f"{stem}.{part}" for stem in self.packed for part in ("values", "codes")}
        dense = [n for n in self._initializers if n not in parts and isinstance(self._tensor(n), ir.ExternalTensor)]
        return [*dense, *self.packed]

    def inline(self) -> list[str]:
        """Matrices that lie in the graph file itself, as other exporters leave them there."""
        return [
            name
            for name, value in self._initializers.items()
            if not isinstance(self._tensor(name), ir.ExternalTensor)
            and value.const_value.dtype in _FLOATS
            and len(value.const_value.shape) >= 2
            and value.const_value.size >= _MATRIX
        ]

    def shape(self, name: str) -> torch.Size:
        shape = self._shapes[name] if name in self.packed else torch.Size(self._tensor(name).shape.numpy())
        return torch.Size(reversed(shape)) if name in self.transposed else shape

    def dtype(self, name: str) -> torch.dtype:
        return _TORCH[self._tensor(f"{name}.values" if name in self.packed else name).dtype]

    def read(self, name: str) -> Tensor:
        if name not in self.packed:
            return self._read(name).t().contiguous() if name in self.transposed else self._read(name)
        codes, values = self._read(f"{name}.codes").view(-1), self._read(f"{name}.values")
        return unpack_tensor(PackedTensor(self.packed[name], tuple(self._shapes[name]), values, codes))

    def write(self, name: str, tensor: Tensor) -> None:
        raise CheckpointError(f"writing {name}", found=f"{self.file} is finished", do="Compile again")

    def _tensor(self, name: str) -> ir.TensorProtocol:
        tensor = self._initializers[name].const_value
        assert tensor is not None
        return tensor

    def _read(self, name: str) -> Tensor:
        tensor = self._tensor(name)
        shape = torch.Size(tensor.shape.numpy())
        if not isinstance(tensor, ir.ExternalTensor):
            return torch.from_numpy(tensor.numpy().copy()).view(_TORCH[tensor.dtype]).view(shape)
        out = torch.empty(shape, dtype=_TORCH[tensor.dtype])
        path = self.file.parent / tensor.location
        try:
            with path.open("rb", buffering=0) as file:
                read_into(file.fileno(), out, tensor.offset or 0)
        except (OSError, EOFError) as error:
            raise CheckpointError(
                f"tensor {name} of {self.file.name}",
                found=f"{tensor.location} does not hold it ({error})",
                do="The file was cut short or belongs to another export: copy the folder again",
            ) from error
        return out


def load_graph(file: Path) -> ir.Model:
    """Read an ONNX graph without the data beside it.

    Raises:
        CheckpointError: no such file, not ONNX, or external data that lies outside its folder.
    """
    if not file.is_file():
        raise CheckpointError(f"ONNX file {file}", found="no such file", do="Name the folder that holds model.onnx")
    try:
        model = ir.load(file)
    except Exception as error:  # protobuf's and onnx_ir's own errors
        raise CheckpointError(
            f"ONNX file {file}", found=f"not an ONNX model ({first_line(error)})", do="Export it again"
        ) from error
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            place = Path(tensor.location)
            if place.is_absolute() or ".." in place.parts or (file.parent / place).is_symlink():
                raise CheckpointError(
                    f"tensor {name} of {file.name}",
                    found=f"its data lies in '{tensor.location}', a link or a place outside the folder",
                    do="Do not trust this folder; copy the files themselves into it",
                )
    return model
