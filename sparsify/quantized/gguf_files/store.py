"""A GGUF file read as if it held the tensors of transformers' model, dense.

ggml has names and layouts of its own. transformers knows which tensor is which parameter and turns one into the other
(``get_gguf_hf_weights_map``, its tensor processors); gguf-py makes blocks of numbers dense.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsify.errors import CheckpointError, first_line
from sparsify.finite import check_finite
from sparsify.quantized.dense import Dense, library
from sparsify.quantized.gguf_files.folder import ROPE, make_folder
from sparsify.quantized.gguf_files.header import Entry, Header
from sparsify.quantized.store import made

METHOD = "gguf"


class GgufFile:
    """The tensors of a GGUF file under their own names, whose types and bytes were looked at.

    Attributes:
        folder: config.json and tokenizer files, there as long as this is.

    Raises:
        CheckpointError: a tensor of a type that gguf-py does not read, or one that the file ends before.
    """

    def __init__(self, header: Header, to: torch.dtype, *, finite: bool) -> None:
        self.header, self.to, self.finite = header, to, finite
        self.gguf = library("gguf", "gguf", f"file {header.path}")
        for name, entry in header.tensors.items():
            if entry.start + self._nbytes(name, entry) > header.size:
                raise CheckpointError(
                    f"file {header.path}",
                    found=f"it ends at {header.size} bytes, before its tensor {name} does",
                    do="Fetch it again: it is truncated",
                )
        self.owner, self.folder = make_folder(header, to)

    def names(self) -> Iterable[str]:
        return self.header.tensors.keys()

    def shape(self, name: str) -> torch.Size:
        return torch.Size(self.header.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.to

    def read(self, name: str) -> Tensor:
        return torch.from_numpy(self.dequantized(name))

    def write(self, name: str, tensor: Tensor) -> None:
        raise CheckpointError(f"writing {name}", found="a GGUF file", do="Write to an output")

    def dequantized(self, name: str) -> np.ndarray[Any, Any]:
        """Tensor ``name`` as gguf-py makes it dense, in float32."""
        entry = self.header.tensors[name]
        kind = self.gguf.GGMLQuantizationType(entry.kind)
        data = np.fromfile(self.header.path, np.uint8, self._nbytes(name, entry), offset=entry.start)
        shape = self.gguf.quant_shape_to_byte_shape(entry.shape, kind) if entry.shape else (len(data),)
        given = data.view({"F32": np.float32, "F16": np.float16, "F64": np.float64}.get(kind.name, np.uint8))
        if given.dtype != np.uint8:
            return np.asarray(given.reshape(entry.shape), dtype=np.float32)
        return np.asarray(self.gguf.dequantize(given.reshape(shape), kind), dtype=np.float32)

    def of(self, model: nn.Module) -> GgufStore:
        """The parameters of ``model``, which is that of the folder."""
        return GgufStore(self, model)

    def _nbytes(self, name: str, entry: Entry) -> int:
        try:
            kind = self.gguf.GGMLQuantizationType(entry.kind)
            block, size = self.gguf.GGML_QUANT_SIZES[kind]
            if kind.name not in ("F32", "F16", "F64") and kind not in self.gguf.quants._type_traits:
                raise ValueError(f"{kind.name}, which gguf-py does not make dense")
            if entry.shape and entry.shape[-1] % block:
                raise ValueError(f"{kind.name} in rows of {entry.shape[-1]}, no multiple of {block}")
        except (ValueError, KeyError) as error:
            raise CheckpointError(
                f"tensor {name} of {self.header.path}",
                found=f"its type is not read here ({error})",
                do="Take a file in a common type (Q4_K, Q8_0, F16, …)",
            ) from error
        return math.prod(entry.shape) // int(block) * int(size)


class GgufStore:
    """The parameters of transformers' model, each made of its tensors when it is asked for.

    Raises:
        CheckpointError: transformers does not know this architecture's tensors.
    """

    def __init__(self, file: GgufFile, model: nn.Module) -> None:
        self.file, self.to = file, file.to
        self._processor, self._names = _mapping(file, model)
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self._parts: dict[str, list[str]] = {}
        for stored in file.names():
            # Experts are joined: a processor finds their parameter by the name without its end.
            name = self._names.get(stored) or self._names.get(stored.removesuffix(".weight"))
            if name is not None or stored != ROPE:
                self._parts.setdefault(name or stored, []).append(stored)

    def names(self) -> Iterable[str]:
        return self._parts.keys()

    def shape(self, name: str) -> torch.Size:
        """The parameter's own where the file has so many numbers for it, else the file's."""
        stored = [self.file.shape(part) for part in self._parts[name]]
        own = self._shapes.get(name)
        return own if own is not None and own.numel() == sum(s.numel() for s in stored) else stored[0]

    def dtype(self, name: str) -> torch.dtype:
        return self.to

    def read(self, name: str) -> Tensor:
        """The parameter ``name``.

        Raises:
            CheckpointError: its tensors do not make it, or it is not finite where it has to be.
        """
        tensor = made(name, {}, Dense({}, self.shape(name), lambda parts, to: self._made(name)), self.to)
        if self.file.finite:
            check_finite(name, tensor, str(self.file.header.path))
        return tensor

    def write(self, name: str, tensor: Tensor) -> None:
        self.file.write(name, tensor)

    @property
    def quantization(self) -> dict[str, Any]:
        """As of :class:`sparsify.quantized.store.QuantizedStore`."""
        return {
            "method": METHOD,
            "dtype": str(self.to).removeprefix("torch."),
            "stored_bytes": self.file.header.size,
            "dense_bytes": sum(self.shape(name).numel() * self.to.itemsize for name in self._parts),
        }

    def _made(self, name: str) -> Tensor:
        parsed: dict[str, dict[str, Tensor]] = {"tensors": {}}
        for stored in self._parts[name]:
            result = self._processor.process(
                weights=self.file.dequantized(stored),
                name=stored,
                tensor_key_mapping=self._names,
                parsed_parameters=parsed,
            )
            # None: what it made it has put there itself.
            if result.name is not None:
                parsed["tensors"][name] = torch.from_numpy(np.ascontiguousarray(result.weights))
        if parsed["tensors"].keys() != {name}:
            raise ValueError(f"{sorted(parsed['tensors'])[:3]} came of {self._parts[name][:3]}")
        return parsed["tensors"][name]


class _Shallow:
    """A model as far as names are looked for in it: its own and those of its children (of models without a head).

    transformers goes through every module of it, and makes the table of all layers for each.
    """

    def __init__(self, module: Any, deeper: bool = True) -> None:
        self.state_dict, self.config = module.state_dict, getattr(module, "config", None)
        self._children = [(n, _Shallow(m, False)) for n, m in module.named_children()] if deeper else []

    def named_children(self) -> list[tuple[str, _Shallow]]:
        return self._children


def _mapping(file: GgufFile, model: Any) -> tuple[Any, Mapping[str, str]]:
    """What turns the architecture's tensors into transformers', and their names to those of its parameters."""
    from transformers import modeling_gguf_pytorch_utils as legacy

    architecture = file.header.metadata["general.architecture"]
    try:
        # What it makes of metadata its processors read; of a config, names alone differ.
        parsed = legacy.load_gguf_checkpoint(str(file.header.path), return_tensors=False)["config"]
        processor = legacy.TENSOR_PROCESSORS.get(architecture, legacy.TensorProcessor)(config=parsed)
        return processor, legacy.get_gguf_hf_weights_map(_Shallow(model), processor)
    except Exception as error:  # of many kinds
        raise CheckpointError(
            f"file {file.header.path}",
            found=f"transformers does not know the tensors of {architecture!r} ({first_line(error)})",
            do="Take the model from before it became a GGUF file",
        ) from error
