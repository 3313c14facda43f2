"""Nodes and constants that give a graph its weights, in front of all that it computes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir


class Builder:
    """Adds to ``graph``; ``values`` are those that are made once and read by many, by name."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.values: dict[str, ir.Value] = {}
        self._first: ir.Node | None = next(iter(graph), None)

    def initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """A stored tensor."""
        value = ir.Value(name=name, const_value=tensor)
        value.shape, value.dtype = ir.Shape(tuple(tensor.shape)), tensor.dtype
        self.graph.register_initializer(value)
        return value

    def constant(self, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
        """A small tensor in the graph file, made once under its name."""
        full = f"sparsify.{name}"
        if full not in self.values:
            self.values[full] = self.initializer(full, ir.tensor(array, name=full))
        return self.values[full]

    def zeros(self, shape: list[int], dtype: ir.DataType) -> ir.Value:
        name = f"sparsify.zeros.{'x'.join(map(str, shape))}.{dtype.name.lower()}"
        if name not in self.values:
            fill = ir.tensor(np.zeros(1, dtype.numpy()), dtype=dtype)
            self.values[name] = self.node("ConstantOfShape", [self._shape(shape)], name, shape, dtype, value=fill)
        return self.values[name]

    def reshape(self, value: ir.Value, shape: list[int], name: str) -> ir.Value:
        assert value.dtype is not None
        return self.node("Reshape", [value, self._shape(shape)], name, shape, value.dtype)

    def _shape(self, shape: list[int]) -> ir.Value:
        return self.constant(f"shape.{'x'.join(map(str, shape))}", np.array(shape, np.int64))

    def node(
        self,
        kind: str,
        inputs: Sequence[ir.Value],
        name: str,
        shape: Iterable[object],
        dtype: ir.DataType,
        **attributes: object,
    ) -> ir.Value:
        """What an operator gives, called ``name``."""
        node = ir.node(kind, inputs, attributes=attributes)
        out = node.outputs[0]
        out.name, out.shape, out.dtype = name, ir.Shape(tuple(shape)), dtype
        if self._first is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(self._first, node)
        return out

    def stack(self, name: str, parts: Sequence[ir.Value], wanted: ir.DataType) -> ir.Value:
        """``parts`` along a new first axis."""
        rows = []
        for i, part in enumerate(parts):
            assert part.shape is not None
            zero = self.constant("zero", np.array([0], np.int64))
            rows.append(self.node("Unsqueeze", [part, zero], f"{name}.{i}", [1, *part.shape], wanted))
        return self.concat(name, rows, 0, wanted)

    def concat(self, name: str, parts: Sequence[ir.Value], axis: int, wanted: ir.DataType) -> ir.Value:
        """``parts`` one after the other along ``axis``."""
        shapes = [[int(n) for n in part.shape or ()] for part in parts]
        shape = [*shapes[0][:axis], sum(s[axis] for s in shapes), *shapes[0][axis + 1 :]]
        return self.node("Concat", parts, name, shape, wanted, axis=axis)

    def swapped(self, name: str, value: ir.Value, one: int, other: int, wanted: ir.DataType) -> ir.Value:
        """``value`` with two of its axes in each other's place."""
        order = list(range(len(value.shape or ())))
        order[one], order[other] = order[other], order[one]
        shape = [(value.shape or ())[axis] for axis in order]
        return self.node("Transpose", [value], name, shape, wanted, perm=order)

    def piece(self, name: str, value: ir.Value, axis: int, start: int, stop: int, wanted: ir.DataType) -> ir.Value:
        """``value`` from ``start`` to ``stop`` along ``axis``."""
        shape = [int(n) for n in value.shape or ()]
        shape[axis] = stop - start
        bounds = [self.constant(f"at.{n}", np.array([n], np.int64)) for n in (start, stop, axis)]
        return self.node("Slice", [value, *bounds], name, shape, wanted)
