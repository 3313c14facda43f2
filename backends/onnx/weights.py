"""Give a graph's parameters their numbers: a link into the checkpoint, one data file, or packed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from sparsify.backends.onnx.pack import Format, best_format, pack, unpacking_bytes
from sparsify.errors import BackendError
from sparsify.files.checkpoint import Checkpoint
from sparsify.ir.weights import Conversion, Weights
from sparsify.tensors import as_bytes, checksum

Mode = Literal["link", "external", "packed"]
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


@dataclass(frozen=True)
class StoredWeight:
    """One tensor of the checkpoint in the graph: how it is stored, in how many bytes, and at what price.

    ``checksum`` is the CRC-32 of its dense bytes in ``dtype`` and the checkpoint's layout; None where it is a link.
    ``transposed``: the file holds the other layout.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    format: Format
    nbytes: int
    dense_bytes: int
    unpacking: int = 0
    checksum: int | None = None
    transposed: bool = False


class DataFile:
    """``model.onnx.data``: tensors one after the other, each written when it is known and then forgotten."""

    ALIGN = 64

    def __init__(self, path: Path) -> None:
        self.path, self.end = path, 0

    def append(self, name: str, tensor: Tensor) -> ir.ExternalTensor:
        tensor = tensor.detach().cpu().contiguous()
        start = -(-self.end // self.ALIGN) * self.ALIGN
        size = tensor.numel() * tensor.element_size()
        with self.path.open("r+b" if self.path.exists() else "w+b") as file:
            file.truncate(start)
            file.seek(start)
            file.write(as_bytes(tensor))
        self.end = start + size
        return external(self.path, start, size, tensor.dtype, tuple(tensor.shape), name)


def external(
    path: Path, start: int, size: int, dtype: torch.dtype, shape: Sequence[int], name: str
) -> ir.ExternalTensor:
    """A tensor that lies in a file beside the graph."""
    return ir.ExternalTensor(
        path.name, start, size, TYPES[dtype], shape=ir.Shape(tuple(shape)), name=name, base_dir=str(path.parent)
    )


class Attachment:
    """Builds, for each parameter, the initializers and operators that give its value.

    Args:
        model: the graph. ``weights``: parameters over the checkpoint in the output folder.
        folder: where the data file goes; ``dtype``: that of the stored weights, the checkpoint's own where None.

    Raises:
        BackendError: a conversion of transformers that no operator does here, or a dtype that ONNX has not.
    """

    def __init__(
        self, model: ir.Model, weights: Weights, folder: Path, mode: Mode, dtype: torch.dtype | None = None
    ) -> None:
        self.graph, self.weights, self.mode, self.dtype = model.graph, weights, mode, dtype
        self.data = DataFile(folder / DATA)
        self.stored: dict[str, StoredWeight] = {}
        self._first: ir.Node | None = next(iter(model.graph), None)
        self._values: dict[str, ir.Value] = {}

    def attach(self, parameters: dict[str, ir.Value], prefix: str) -> None:
        """Replace every value of ``parameters`` (names in the traced program) by the checkpoint's tensor."""
        for name, value in parameters.items():
            parameter = self.weights.canonical(name.removeprefix(prefix))
            if parameter not in self.weights:
                raise BackendError(
                    f"exporting {name} to ONNX",
                    found="a tensor that the graph reads and no file of the checkpoint holds",
                    do="Save the model again with save_pretrained, then export that folder",
                )
            conversion = self.weights.conversion(parameter)
            assert value.dtype is not None
            if conversion is not None:
                joined = self._converted(parameter, conversion, value.dtype)
            else:
                key = self.weights.sources(parameter)[0]
                if self.mode == "external" and (turned := _transposes(value)):
                    # A MatMul reads [in_features, out_features]: stored so, tools that match its constant find one.
                    joined = self._leaf(key, value.dtype, transposed=True)
                    for node in turned:
                        node.outputs[0].replace_all_uses_with(joined)
                        self.graph.remove(node, safe=True)
                    continue
                raw = self._raw(key, value.dtype)
                if raw.dtype != value.dtype and self._gathered_only(value):
                    self._cast_after_gather(raw, value)
                    continue
                joined = self._leaf(key, value.dtype)
            value.replace_all_uses_with(joined)

    def _leaf(self, key: str, wanted: ir.DataType, *, transposed: bool = False) -> ir.Value:
        """The checkpoint's tensor ``key`` in the dtype that the graph computes with."""
        raw = self._raw(key, wanted, transposed=transposed)
        if raw.dtype == wanted:
            return raw
        name = f"{key}/{wanted.name.lower()}"
        if name not in self._values:
            self._values[name] = self._node("Cast", [raw], name, raw.shape, wanted, to=wanted)
        return self._values[name]

    def _raw(self, key: str, wanted: ir.DataType, *, transposed: bool = False) -> ir.Value:
        if key not in self._values:
            self._values[key] = self._store(key, wanted, transposed=transposed)
        return self._values[key]

    def _store(self, key: str, wanted: ir.DataType, *, transposed: bool) -> ir.Value:
        store = self.weights.store
        shape, source = tuple(store.shape(key)), store.dtype(key)
        kept = self.dtype if self.dtype is not None and source.is_floating_point else source
        if source not in TYPES:
            raise BackendError(f"exporting {key} to ONNX", found=f"dtype {source}", do="Convert the checkpoint first")
        size = math.prod(shape) * kept.itemsize
        if self.mode == "link":
            assert isinstance(store, Checkpoint), "a link needs a file to point into"
            path, start, length = store.span(key)
            self.stored[key] = StoredWeight(key, shape, source, "dense", length, length)
            return self._initializer(key, external(path, start, length, source, shape, key))
        tensor = store.read(key).to(kept)
        crc = checksum(tensor)
        if transposed:
            tensor = tensor.t()
        form: Format = best_format(tensor) if self.mode == "packed" else "dense"
        if form == "dense":
            self.stored[key] = StoredWeight(key, shape, kept, form, size, size, checksum=crc, transposed=transposed)
            return self._initializer(key, self.data.append(key, tensor))
        return self._packed(key, tensor, form, wanted, crc)

    def _packed(self, key: str, tensor: Tensor, form: Format, wanted: ir.DataType, crc: int) -> ir.Value:
        packed = pack(tensor, form)
        count, values = tensor.numel(), packed.values.numel()
        self.stored[key] = StoredWeight(
            key, packed.shape, tensor.dtype, form, packed.nbytes, count * tensor.element_size(),
            unpacking_bytes(form, count, values, int(wanted.itemsize)), crc,
        )  # fmt: skip
        stored = self._initializer(f"{key}.values", self.data.append(f"{key}.values", packed.values))
        codes = self._initializer(f"{key}.codes", self.data.append(f"{key}.codes", packed.codes.view(-1, 1)))
        if stored.dtype != wanted:
            # Before the values are spread out, when they are few; and bfloat16 cannot be scattered on a CPU.
            stored = self._node("Cast", [stored], f"{key}/cast", stored.shape, wanted, to=wanted)
        spread = self._spread_24 if form == "2:4" else self._spread_mask
        return spread(key, packed.shape, stored, codes, wanted)

    def _spread_24(
        self, key: str, shape: tuple[int, ...], values: ir.Value, codes: ir.Value, wanted: ir.DataType
    ) -> ir.Value:
        groups, u8, i32 = math.prod(shape) // 4, ir.DataType.UINT8, ir.DataType.INT32
        x = self._node("BitShift", [codes, self._constant("shifts", np.array([0, 2, 4, 6], np.uint8))],
                       f"{key}/shifted", [groups // 2, 4], u8, direction="RIGHT")  # fmt: skip
        x = self._node("BitwiseAnd", [x, self._constant("three", np.array(3, np.uint8))], f"{key}/masked",
                       [groups // 2, 4], u8)  # fmt: skip
        x = self._reshape(x, [groups, 2], f"{key}/pairs")
        x = self._node("Cast", [x], f"{key}/positions", [groups, 2], i32, to=i32)
        zeros = self._zeros([groups, 4], wanted)
        x = self._node("ScatterElements", [zeros, x, values], f"{key}/groups", [groups, 4], wanted, axis=1)
        return self._reshape(x, list(shape), key)

    def _spread_mask(
        self, key: str, shape: tuple[int, ...], values: ir.Value, codes: ir.Value, wanted: ir.DataType
    ) -> ir.Value:
        assert codes.shape is not None and values.shape is not None
        size, width, kept = math.prod(shape), int(codes.shape[0]), int(values.shape[0])
        bits = self._constant("bits", (1 << np.arange(8)).astype(np.uint8)[None])
        x = self._node("BitwiseAnd", [codes, bits], f"{key}/bits", [width, 8], ir.DataType.UINT8)
        x = self._reshape(x, [width * 8], f"{key}/flat")
        # The declared shape lets onnxruntime fold it: it folds only what it can tell the size of.
        x = self._node("NonZero", [x], f"{key}/nonzero", [1, kept], ir.DataType.INT64)
        x = self._reshape(x, [kept], f"{key}/positions")
        x = self._node(
            "ScatterElements", [self._zeros([size], wanted), x, values], f"{key}/row", [size], wanted, axis=0
        )
        return self._reshape(x, list(shape), key)

    def _converted(self, parameter: str, conversion: Conversion, wanted: ir.DataType) -> ir.Value:
        """A parameter that transformers joins from several tensors, joined by the graph instead."""
        parts: dict[str, Any] = {}
        for key, pattern in conversion.sources:
            parts.setdefault(pattern, []).append(self._leaf(key, wanted))
        current: list[Any] = list(parts.values())
        for operation in conversion.converter.operations:
            kind, axis = type(operation).__name__, getattr(operation, "dim", 0)
            if kind == "MergeModulelist" and axis == 0:
                current = [self._stack(f"{parameter}/{i}", part, wanted) for i, part in enumerate(current)]
            elif kind == "Concatenate" and all(isinstance(part, ir.Value) for part in current):
                current = [self._concat(f"{parameter}/joined", current, axis, wanted)]
            else:
                break
        if len(conversion.targets) != 1 or len(current) != 1 or not isinstance(current[0], ir.Value):
            kinds = [type(o).__name__ for o in conversion.converter.operations]
            raise BackendError(
                f"exporting {parameter} to ONNX",
                found=f"transformers makes it from {len(conversion.sources)} tensors by {', '.join(kinds)}, "
                "which is not expressed in the graph",
                do="Save the model again with this version of transformers, then export that folder",
            )
        return current[0]

    def _stack(self, name: str, parts: list[ir.Value], wanted: ir.DataType) -> ir.Value:
        rows = []
        for i, part in enumerate(parts):
            assert part.shape is not None
            rows.append(self._node("Unsqueeze", [part, self._constant("zero", np.array([0], np.int64))],
                                   f"{name}.{i}", [1, *part.shape], wanted))  # fmt: skip
        return self._concat(name, rows, 0, wanted)

    def _concat(self, name: str, parts: list[ir.Value], axis: int, wanted: ir.DataType) -> ir.Value:
        shapes = [[int(n) for n in part.shape or ()] for part in parts]
        shape = [*shapes[0][:axis], sum(s[axis] for s in shapes), *shapes[0][axis + 1 :]]
        return self._node("Concat", parts, name, shape, wanted, axis=axis)

    def _gathered_only(self, value: ir.Value) -> bool:
        return all(use.node.op_type == "Gather" and use.idx == 0 for use in value.uses())

    def _cast_after_gather(self, stored: ir.Value, value: ir.Value) -> None:
        """Look embeddings up as stored and convert the rows alone: the table is never held twice."""
        wanted = value.dtype
        assert wanted is not None
        for use in list(value.uses()):
            node = use.node
            node.replace_input_with(0, stored)
            rows = node.outputs[0]
            cast = ir.node("Cast", [rows], attributes={"to": wanted})
            cast.outputs[0].name = f"{rows.name}/cast"
            cast.outputs[0].shape, cast.outputs[0].dtype = rows.shape, wanted
            rows.replace_all_uses_with(cast.outputs[0], replace_graph_outputs=True)
            cast.replace_input_with(0, rows)
            rows.dtype = stored.dtype
            self.graph.insert_after(node, cast)

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(name=name, const_value=tensor)
        value.shape, value.dtype = ir.Shape(tuple(tensor.shape)), tensor.dtype
        self.graph.register_initializer(value)
        return value

    def _constant(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        full = f"sparsify.{name}"
        if full not in self._values:
            self._values[full] = self._initializer(full, ir.tensor(array, name=full))
        return self._values[full]

    def _zeros(self, shape: list[int], dtype: ir.DataType) -> ir.Value:
        name = f"sparsify.zeros.{'x'.join(map(str, shape))}.{dtype.name.lower()}"
        if name not in self._values:
            fill = ir.tensor(np.zeros(1, dtype.numpy()), dtype=dtype)
            self._values[name] = self._node("ConstantOfShape", [self._shape(shape)], name, shape, dtype, value=fill)
        return self._values[name]

    def _reshape(self, value: ir.Value, shape: list[int], name: str) -> ir.Value:
        assert value.dtype is not None
        return self._node("Reshape", [value, self._shape(shape)], name, shape, value.dtype)

    def _shape(self, shape: list[int]) -> ir.Value:
        return self._constant(f"shape.{'x'.join(map(str, shape))}", np.array(shape, np.int64))

    def _node(
        self, kind: str, inputs: list[ir.Value], name: str, shape: Any, dtype: ir.DataType, **attributes: Any
    ) -> ir.Value:
        node = ir.node(kind, inputs, attributes=attributes)
        out = node.outputs[0]
        out.name, out.shape, out.dtype = name, ir.Shape(tuple(shape)), dtype
        if self._first is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(self._first, node)
        return out


def _transposes(value: ir.Value) -> list[ir.Node]:
    """The nodes that read ``value``, where each is a transpose of a matrix; else none."""
    nodes = [use.node for use in value.uses()]
    plain = all(n.op_type == "Transpose" and list(n.attributes["perm"].as_ints()) == [1, 0] for n in nodes)
    return nodes if plain else []
