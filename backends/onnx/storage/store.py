"""The weights of an ONNX file as a store of named tensors, packed ones unpacked as they are read."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor

from sparsify.backends.onnx.products.bodies import DOMAIN, EXPERTS, OPERATORS, Form
from sparsify.backends.onnx.storage.datafile import TYPES
from sparsify.backends.onnx.storage.pack import FORMATS, Format, PackedTensor, misfit, unpack_tensor
from sparsify.errors import CheckpointError, first_line
from sparsify.files.checkpoint import INDEX, WEIGHTS, Checkpoint
from sparsify.files.companions import check_companions
from sparsify.files.ledger import HEADER_SUFFIX, Ledger, digest_of_header
from sparsify.files.manifest import section
from sparsify.files.reading import admit
from sparsify.runtime.layout import Packed, unpack
from sparsify.runtime.soundness import check
from sparsify.tensors import CRC, read_into

_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
# Smaller ones are tables that the graph computes with.
_MATRIX = 256
# Bytes of a graph without the data beside it: what protobuf reads at most.
MAX_GRAPH = 1 << 31
_TORCH = {onnx: kind for kind, onnx in TYPES.items()}


class GraphStore:
    """Tensors of the graph ``file`` by name, read one at a time.

    ``packed`` maps the names of packed tensors to their formats; ``transposed`` are matrices that the file holds the
    other way round than the checkpoint, and that are read the checkpoint's way. ``ledger`` is what the graph and the
    files beside it are held against now, and each tensor, dense, when it is read.

    Raises:
        CheckpointError: the file is no ONNX model, data that it points to is missing or cut short, or what was read is
            not what was written.
    """

    def __init__(self, file: Path, transposed: Collection[str] = (), ledger: Ledger | None = None) -> None:
        self.file, self.transposed, self.ledger = file, frozenset(transposed), ledger or Ledger()
        self.ledger.check_file(file)
        self.model = load_graph(file)
        self._initializers = dict(self.model.graph.initializers)
        self._check_data()
        self.packed: dict[str, Format] = {}
        # Those of them that our operators read as they are, and how they lie; the groups of those of few bits.
        self.sparse: dict[str, Form] = {}
        self._groups: dict[str, int | None] = {}
        self._shapes: dict[str, torch.Size] = {}
        for name in self._initializers:
            stem = name.removesuffix(".values")
            if stem != name and {f"{stem}.codes", f"{stem}.scales"} & self._initializers.keys():
                self._note_packed(stem)

    def _check_data(self) -> None:
        tensors = (value.const_value for value in self._initializers.values())
        for place in dict.fromkeys(t.location for t in tensors if isinstance(t, ir.ExternalTensor)):
            path = self.file.parent / place
            if path.suffix != HEADER_SUFFIX:
                self.ledger.check_file(path)
            elif path.is_file() and self.ledger.complete:
                self.ledger.check_header(path.name, digest_of_header(path))

    def _note_packed(self, stem: str) -> None:
        beside = f"{stem}.codes" if f"{stem}.codes" in self._initializers else f"{stem}.scales"
        reader = next(iter(self._initializers[beside].consumers()), None)
        while reader is not None and reader.op_type in ("Concat", "Slice"):
            reader = next(iter(reader.outputs[0].consumers()), None)
        if reader is not None and reader.domain == DOMAIN and reader.op_type in OPERATORS:
            self._note_sparse(stem, reader)
            return
        if beside.endswith(".scales"):
            return  # somebody else's
        value = next((v for n in self.model.graph for v in n.outputs if v.name == stem), None)
        if reader is None or value is None or value.shape is None or not value.shape.is_static():
            raise CheckpointError(f"{self.file}", found=f"{stem} is packed in an unknown way", do="Export it again")
        self.packed[stem] = "2:4" if len(self._tensor(f"{stem}.values").shape) == 2 else "bitmask"
        self._shapes[stem] = torch.Size(int(n) for n in value.shape)

    def _note_sparse(self, stem: str, reader: ir.Node) -> None:
        form = OPERATORS[reader.op_type]
        found = f"{stem} is packed, and no sizes of a matrix are said of it"
        again = CheckpointError(f"{self.file}", found=found, do="Export it again")
        asked = ["in_features", *(() if form.bits is None else ("group",))]
        # Of a stack that is one tensor, all; where one is joined from several, each has rows of its own.
        whole = reader in self._initializers[f"{stem}.values"].consumers()
        leading = (["experts"] if reader.op_type in EXPERTS else []) + ["out_features"] if whole else []
        given = {name: reader.attributes.get(name) for name in (*leading, *asked)}
        sizes = {
            name: n.value
            for name, n in given.items()
            if n is not None and n.type == ir.AttributeType.INT and 0 < n.value < 1 << 40
        }
        if len(sizes) != len(given) or any(f"{stem}.{part}" not in self._initializers for part in form.parts):
            raise again
        rows = [sizes[name] for name in leading] or list(self._tensor(f"{stem}.{form.parts[-1]}").shape.numpy())[:1]
        if not rows:
            raise again
        self.sparse[stem], self.packed[stem] = form, FORMATS[form.layout]
        self._shapes[stem] = torch.Size([*rows, sizes["in_features"]])
        # A scale for all columns is one for the row.
        shared = sizes.get("group", sizes["in_features"])
        self._groups[stem] = shared if form.bits is not None and shared < sizes["in_features"] else None

    def names(self) -> Iterable[str]:
        """Names of the weights that lie beside the graph, dense and packed."""
        parts = {f"{stem}.{part}" for stem in self.packed for part in ("values", "codes", "scales")}
        dense = [
            name
            for name in self._initializers
            if name not in parts
            and isinstance(self._tensor(name), ir.ExternalTensor)
            and self._tensor(name).dtype in _TORCH
        ]
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

    def foreign(self) -> dict[str, str]:
        """Stored tensors of a data type that torch has not, and their types: they are named and never read."""
        types = {name: self._tensor(name).dtype for name in self._initializers}
        return {name: kind.name for name, kind in types.items() if kind not in _TORCH}

    def label(self, name: str) -> str:
        """How a weight lies in the file, in words."""
        bits = self.sparse[name].bits if name in self.sparse else None
        return self.packed.get(name, "dense") + ("" if bits is None else f" int{bits}")

    def lies(self, name: str) -> tuple[Form, torch.Size, int | None]:
        """How a weight that our operators read lies in the file: form, shape, and the columns that share a scale."""
        return self.sparse[name], self._shapes[name], self._groups[name]

    def shape(self, name: str) -> torch.Size:
        shape = self._shapes[name] if name in self.packed else torch.Size(self._tensor(name).shape.numpy())
        return torch.Size([*shape[:-2], shape[-1], shape[-2]]) if name in self.transposed else shape

    def dtype(self, name: str) -> torch.dtype:
        part = "" if name not in self.packed else ".scales" if name in self.of_few_bits() else ".values"
        return _TORCH[self._tensor(name + part).dtype]

    def read(self, name: str) -> Tensor:
        tensor = self._dense(name)
        self.ledger.check_tensor(name, tensor)
        return tensor

    def _dense(self, name: str) -> Tensor:
        if name not in self.packed:
            return self._read(name).mT.contiguous() if name in self.transposed else self._read(name)
        if name in self.sparse:
            weight = self._unpacked(name)
            return weight.mT.contiguous() if name in self.transposed else weight
        codes, values = self._read(f"{name}.codes"), self._read(f"{name}.values")
        codes = codes.view(-1)
        packed = PackedTensor(self.packed[name], tuple(self._shapes[name]), values, codes)
        if (wrong := misfit(packed)) is not None:
            raise CheckpointError(f"packed tensor {name} of {self.file.name}", found=wrong, do="Export it again")
        return unpack_tensor(packed)

    def _unpacked(self, name: str) -> Tensor:
        """What our operators multiply with."""
        form, shape = self.sparse[name], self._shapes[name]
        rows, columns = math.prod(shape[:-1]), shape[-1]
        parts = {part: self._read(f"{name}.{part}") for part in form.parts}
        codes = parts.get("codes", torch.empty(rows, 0, dtype=torch.uint8))
        words = codes.dtype is torch.uint8 and codes.dim() == 2 and codes.shape[1] % 4 == 0
        codes = codes.view(torch.int32) if form.layout == "bitmask" and words else codes
        found = Packed(
            form.layout, (rows, columns), parts["values"], codes, parts.get("scales"), form.bits, self._groups[name]
        )
        check(f"{name} of {self.file.name}", found)
        return unpack(found).view(shape)

    def of_few_bits(self) -> set[str]:
        """Weights that our operators read as integers."""
        return {name for name, form in self.sparse.items() if form.bits is not None}

    def write(self, name: str, tensor: Tensor) -> None:
        raise CheckpointError(f"writing {name}", found=f"{self.file} is finished", do="Compile again")

    def _tensor(self, name: str) -> ir.TensorProtocol:
        tensor: ir.TensorProtocol = self._initializers[name].const_value
        return tensor

    def _read(self, name: str) -> Tensor:
        tensor = self._tensor(name)
        what, again = f"tensor {name} of {self.file.name}", "The file was cut short or belongs to another export"
        kind = _TORCH.get(tensor.dtype)
        if kind is None:
            raise CheckpointError(what, found=f"data of type {tensor.dtype.name}", do="torch has no equivalent here")
        shape = torch.Size(tensor.shape.numpy())
        if not isinstance(tensor, ir.ExternalTensor):
            try:
                return torch.from_numpy(tensor.numpy().copy()).view(kind).view(shape)
            except Exception as error:  # numpy's, protobuf's and onnx_ir's
                raise CheckpointError(
                    what, found=f"other data than its shape says ({first_line(error)})", do=again
                ) from error
        path, start, need = self.file.parent / tensor.location, tensor.offset or 0, math.prod(shape) * kind.itemsize
        try:
            # Before memory is asked for: a shape may say anything.
            if tensor.length not in (None, need) or start + need > admit(path).stat().st_size:
                raise EOFError(f"{need} bytes from {start}")
            out = torch.empty(shape, dtype=kind)
            with path.open("rb", buffering=0) as file:
                read_into(file.fileno(), out, start)
        except (OSError, EOFError, ValueError) as error:
            raise CheckpointError(what, found=f"{tensor.location} does not hold it ({error})", do=again) from error
        return out


def load_graph(file: Path) -> ir.Model:
    """Read an ONNX graph without the data beside it.

    Raises:
        CheckpointError: no such file, not ONNX, or external data that lies outside its folder.
    """
    if not file.exists():
        raise CheckpointError(f"ONNX file {file}", found="no such file", do="Name the folder that holds model.onnx")
    if (size := admit(file).stat().st_size) > MAX_GRAPH:
        raise CheckpointError(f"ONNX file {file}", found=f"{size} bytes, more than {MAX_GRAPH}", do="Export it again")
    try:
        model = ir.load(file)
    except Exception as error:  # protobuf's and onnx_ir's own errors
        raise CheckpointError(
            f"ONNX file {file}", found=f"not an ONNX model ({first_line(error)})", do="Export it again"
        ) from error
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or any(not isinstance(n, int) or not 0 <= n < 1 << 48 for n in tensor.shape):
            raise CheckpointError(f"tensor {name} of {file.name}", found="no data, or no shape", do="Export it again")
        if isinstance(tensor, ir.ExternalTensor):
            if not 0 <= (tensor.offset or 0) < 1 << 62:
                raise CheckpointError(
                    f"tensor {name} of {file.name}", found=f"offset {tensor.offset}", do="Export it again"
                )
            place = Path(tensor.location)
            if place.is_absolute() or ".." in place.parts:
                raise CheckpointError(
                    f"tensor {name} of {file.name}",
                    found=f"its data lies in '{tensor.location}', a place outside the folder",
                    do="Do not trust this folder; copy the files themselves into it",
                )
            if (file.parent / place).is_symlink():
                raise CheckpointError(
                    f"tensor {name} of {file.name}",
                    found=f"its data {tensor.location} is a link, which onnxruntime does not follow",
                    do="Copy the file itself into the folder; from the hub fetch it with hf download --local-dir",
                )
    return model


def check_written(file: Path, check: bool = True) -> Ledger:
    """Hold a graph and all that lies beside it against the folder's ``sparsify.json``, before a runtime opens it.

    Args:
        check: False checks nothing.

    Raises:
        CheckpointError: something is not what was written.
    """
    admit(file)
    ledger = Ledger.of(file.parent, check)
    if ledger.checked in ("none", "skipped"):
        return ledger
    check_companions(file.parent, ledger)
    turned = section(ledger.manifest, "onnx").get("transposed", ())
    store = GraphStore(file, turned if isinstance(turned, list) else (), ledger)
    if (file.parent / WEIGHTS).exists() or (file.parent / INDEX).exists():
        Checkpoint(file.parent, ledger=ledger).check()
    elif ledger.checked == CRC:
        # Which are sums of dense tensors; of the file that holds them there is none.
        for name in store.names():
            store.read(name)
    return ledger
