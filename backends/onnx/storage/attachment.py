"""Give a graph's parameters their numbers: a link into the checkpoint, one data file, or packed."""

from __future__ import annotations

import math
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor

from sparsify.backends.onnx.options import Mode
from sparsify.backends.onnx.products.packing import Packing
from sparsify.backends.onnx.products.plain import as_gemms
from sparsify.backends.onnx.products.sparse import (
    add_functions,
    form_of,
    is_turned,
    reading_products,
    replace_product,
)
from sparsify.backends.onnx.products.stacks import is_in_first, join, order_of, reading_experts, replace_experts
from sparsify.backends.onnx.storage.builder import Builder
from sparsify.backends.onnx.storage.converted import convert
from sparsify.backends.onnx.storage.datafile import DATA, TYPES, DataFile, external
from sparsify.backends.onnx.storage.pack import Format, best_format, pack_tensor, unpacking_bytes
from sparsify.backends.onnx.storage.spread import spread_24, spread_bitmask
from sparsify.backends.onnx.storage.stored import StoredWeight, stored_packed
from sparsify.backends.onnx.storage.uses import cast_after_gather, gathered_only, mark_shared, transposes
from sparsify.context import counted
from sparsify.errors import BackendError, Refused
from sparsify.files.checkpoint import Checkpoint
from sparsify.finite import said, scan
from sparsify.ir.weights import Conversion, Weights
from sparsify.runtime.layout import Packed
from sparsify.runtime.shard import rows_of
from sparsify.tensors import digest


class Attachment:
    """Builds, for each parameter, the initializers and operators that give its value.

    Args:
        model: the graph. ``weights``: parameters over the checkpoint in the output folder.
        folder: where the data file goes; ``dtype``: that of the stored weights, the checkpoint's own where None.
        packing: of ``sparse``, how.

    Raises:
        BackendError: a conversion of transformers that no operator does here, or a dtype that ONNX has not.
    """

    def __init__(
        self,
        model: ir.Model,
        weights: Weights,
        folder: Path,
        mode: Mode,
        dtype: torch.dtype | None = None,
        packing: Packing | None = None,
    ) -> None:
        self.model, self.build = model, Builder(model.graph)
        self.weights, self.mode, self.dtype = weights, mode, dtype
        self.packing = packing or Packing()
        self.data = DataFile(folder / DATA)
        self.stored: dict[str, StoredWeight] = {}

    def attach(self, parameters: dict[str, ir.Value], prefix: str) -> None:
        """Replace every value of ``parameters`` (names in the traced program) by the checkpoint's tensor."""
        if self.mode == "sparse":
            as_gemms(self.build, parameters.values())
        for name in counted("exporting", parameters):
            value = parameters[name]
            parameter = self.weights.canonical(name.removeprefix(prefix))
            if parameter not in self.weights:
                raise BackendError(
                    f"exporting {name} to ONNX",
                    found="a tensor that the graph reads and no file of the checkpoint holds",
                    do="Save the model again with save_pretrained, then export that folder",
                )
            conversion = self.weights.conversion(parameter)
            assert value.dtype is not None
            if self.mode == "sparse" and self._stack(parameter, value, conversion):
                continue
            if conversion is not None:
                joined = self._converted(parameter, conversion, value.dtype)
            else:
                key = self.weights.sources(parameter)[0]
                if self.mode == "sparse" and self._sparse(key, value):
                    continue
                if self.mode == "external" and (turned := transposes(value)):
                    # A MatMul reads [in_features, out_features]: stored so, tools that match its constant find one.
                    joined = self._leaf(key, value.dtype, transposed=True)
                    for node in turned:
                        node.outputs[0].replace_all_uses_with(joined)
                        self.build.graph.remove(node, safe=True)
                    continue
                raw = self._raw(key, value.dtype)
                if raw.dtype != value.dtype and gathered_only(value):
                    cast_after_gather(self.build.graph, raw, value)
                    continue
                joined = self._leaf(key, value.dtype)
            value.replace_all_uses_with(joined)
        mark_shared(self.build.graph)
        if self.mode == "sparse":
            add_functions(self.model)

    def _sparse(self, key: str, value: ir.Value) -> bool:
        """Give the products with ``value`` to our operators, where all of them are plain and packing pays."""
        nodes = [] if key in self.build.values else reading_products(value)
        if not nodes or self.weights.store.dtype(key) not in TYPES:
            return False
        assert value.dtype is not None
        read = self._kept(key)
        # A stored zero is +0.0: docs/format.md.
        tensor = read + 0.0 if read.is_floating_point() else read
        turned = not is_turned(nodes[0])
        packed = self.packing.packed(tensor.t() if turned else tensor, value.dtype)
        if isinstance(packed, Refused):
            return False
        held = self._held(key, packed)
        for node in nodes:
            replace_product(self.build.graph, node, packed, self.packing.exact, held)
        self.stored[key] = stored_packed(key, tensor, packed, value.dtype, transposed=turned)
        return True

    def _stack(self, parameter: str, value: ir.Value, conversion: Conversion | None) -> bool:
        """Give the products of tokens with an expert each to our operators, where packing the stack pays."""
        pairs, keys = reading_experts(value), self.weights.sources(parameter)
        if not pairs or any(key in self.build.values or self.weights.store.dtype(key) not in TYPES for key in keys):
            return False
        assert value.dtype is not None
        sources = {key: self._kept(key) + 0.0 for key in keys}
        order: list[str] | None = [*keys]
        if conversion is not None:
            stack = self.weights.read(parameter).to(next(iter(sources.values())).dtype) + 0.0
            order = order_of(conversion, stack, sources)
        else:
            stack = sources[keys[0]]
        if order is None or stack.dim() != 3 or not stack.is_floating_point():
            return False
        turned = is_in_first(pairs[0])
        if turned and len(order) not in (1, stack.shape[0]):
            # Parts of a matrix have columns of it then, and what is packed is cut between rows.
            return False
        packed = self.packing.packed((stack.mT if turned else stack).flatten(0, 1), value.dtype)
        if isinstance(packed, Refused):
            return False
        held, first = [], 0
        for key in order:
            count = (sources[key].mT if turned else sources[key]).shape[:-1].numel()
            own = rows_of(packed, first, count)
            held.append(self._held(key, own))
            self.stored[key] = stored_packed(key, sources[key], own, value.dtype, transposed=turned)
            first += count
        values = join(self.build, parameter, packed, held)
        for pair in pairs:
            replace_experts(self.build.graph, self.build, pair, packed, self.packing.exact, values, stack.shape[0])
        return True

    def _held(self, key: str, packed: Packed) -> dict[str, ir.Value]:
        """What holds a packed weight, by part."""
        tensors = {"values": packed.values, "codes": packed.codes.view(torch.uint8), "scales": packed.scales}
        return {
            part: self.build.initializer(f"{key}.{part}", self.data.append(f"{key}.{part}", found))
            for part in form_of(packed).parts
            if (found := tensors[part]) is not None
        }

    def _kept(self, key: str) -> Tensor:
        """The checkpoint's tensor ``key`` in the dtype that is stored.

        Raises:
            BackendError: that dtype does not hold its values.
        """
        store = self.weights.store
        source = store.dtype(key)
        kept = self.dtype if self.dtype is not None and source.is_floating_point else source
        read = store.read(key)
        tensor = read.to(kept)
        if kept != source and (lost := scan(tensor)).count > scan(read).count:
            raise BackendError(
                f"storing {key} in {kept}",
                found=f"values past what it holds: {said(lost, tuple(store.shape(key)))}",
                do="Take dtype=bfloat16, or leave dtype out",
            )
        return tensor

    def _leaf(self, key: str, wanted: ir.DataType, *, transposed: bool = False) -> ir.Value:
        """The checkpoint's tensor ``key`` in the dtype that the graph computes with."""
        raw = self._raw(key, wanted, transposed=transposed)
        if raw.dtype == wanted:
            return raw
        name = f"{key}/{wanted.name.lower()}"
        if name not in self.build.values:
            self.build.values[name] = self.build.node("Cast", [raw], name, raw.shape, wanted, to=wanted)
        return self.build.values[name]

    def _raw(self, key: str, wanted: ir.DataType, *, transposed: bool = False) -> ir.Value:
        if key not in self.build.values:
            self.build.values[key] = self._store(key, wanted, transposed=transposed)
        return self.build.values[key]

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
            return self.build.initializer(key, external(path, start, length, source, shape, key))
        tensor = self._kept(key)
        found = digest(tensor)
        if transposed:
            tensor = tensor.t()
        form: Format = best_format(tensor) if self.mode == "packed" else "dense"
        if form == "dense":
            self.stored[key] = StoredWeight(key, shape, kept, form, size, size, digest=found, transposed=transposed)
            return self.build.initializer(key, self.data.append(key, tensor))
        return self._packed(key, tensor, form, wanted, found)

    def _packed(self, key: str, tensor: Tensor, form: Format, wanted: ir.DataType, found: str) -> ir.Value:
        packed = pack_tensor(tensor, form)
        count, values = tensor.numel(), packed.values.numel()
        self.stored[key] = StoredWeight(
            key,
            packed.shape,
            tensor.dtype,
            form,
            packed.nbytes,
            count * tensor.element_size(),
            unpacking_bytes(form, count, values, int(wanted.itemsize)),
            found,
        )
        stored = self.build.initializer(f"{key}.values", self.data.append(f"{key}.values", packed.values))
        codes = self.build.initializer(f"{key}.codes", self.data.append(f"{key}.codes", packed.codes.view(-1, 1)))
        if stored.dtype != wanted:
            # Before the values are spread out, when they are few; and bfloat16 cannot be scattered on a CPU.
            stored = self.build.node("Cast", [stored], f"{key}/cast", stored.shape, wanted, to=wanted)
        spread = spread_24 if form == "2:4" else spread_bitmask
        return spread(self.build, key, packed.shape, stored, codes, wanted)

    def _converted(self, parameter: str, conversion: Conversion, wanted: ir.DataType) -> ir.Value:
        """A parameter that transformers makes of several tensors, or of a part of one, made by the graph instead."""
        parts: dict[str, list[ir.Value]] = {}
        for key, pattern in conversion.sources:
            parts.setdefault(pattern, []).append(self._leaf(key, wanted))
        # Names of a file are in an order of their own.
        ordered = [parts[pattern] for pattern in conversion.converter.source_patterns if pattern in parts]
        return convert(self.build, parameter, conversion, ordered, wanted)
