"""The axis that a runtime sums over, through everything that moves a weight: each graph against its own arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from sparsify.backends.verify.axis import SummedAxis, summed_axes
from sparsify.backends.verify.judge import judge
from sparsify.backends.verify.promises import Promise, promises
from sparsify.backends.verify.result import Verification
from sparsify.method.pattern import NM, Unstructured


def graph(shape: tuple[int, ...], moves: list[tuple[str, Any]], product: str = "MatMul", **options: int) -> ir.Model:
    """x times the stored tensor ``w`` of ``shape`` after ``moves``; shapes are as numpy computes them."""
    w = ir.val("w", ir.DataType.FLOAT, ir.Shape(shape))
    w.const_value = ir.tensor(np.zeros(shape, np.float32), name="w")
    nodes: list[ir.Node] = []
    value, array, stored = w, np.zeros(shape, np.float32), [w]
    for kind, how in moves:
        inputs: list[ir.Value | None] = [value]
        attributes: dict[str, Any] = {}
        if kind == "Transpose":
            array, attributes = array.transpose(how), {"perm": how}
        elif kind == "Gather":
            index, axis = how
            array, attributes = np.take(array, index, axis=axis), {"axis": axis} if axis else {}
            inputs.append(_constant(np.asarray(index, np.int64), stored))
        elif kind == "GatherND":
            array = array[tuple(np.moveaxis(np.asarray(how), -1, 0))]
            inputs.append(_constant(np.asarray(how, np.int64), stored))
        elif kind == "Unsqueeze":
            array = np.expand_dims(array, tuple(how))
            inputs.append(_constant(np.asarray(how, np.int64), stored))
        elif kind == "Concat":
            array, attributes = np.concatenate([array, array], axis=how), {"axis": how}
            inputs.append(value)
        nodes.append(ir.node(kind, inputs, attributes=attributes))
        value = nodes[-1].outputs[0]
        value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.FLOAT
    x = ir.val("x", ir.DataType.FLOAT, ir.Shape([2] * max(2, array.ndim)))
    nodes.append(ir.node(product, [x, value], attributes=dict(options)))
    made = ir.Graph([x], nodes[-1].outputs, nodes=nodes, initializers=stored, opset_imports={"": 20})
    return ir.Model(made, ir_version=10)


def _constant(array: np.ndarray[Any, Any], stored: list[ir.Value]) -> ir.Value:
    value = ir.val(f"index_{len(stored)}", ir.DataType.INT64, ir.Shape(array.shape))
    value.const_value = ir.tensor(array, name=value.name)
    stored.append(value)
    return value


# Shape, moves, and which axis of the stored tensor a MatMul sums over: the last but one after the moves.
CASES: list[tuple[tuple[int, ...], list[tuple[str, Any]], int | None]] = [
    ((4, 6), [], 0),
    ((4, 6), [("Transpose", [1, 0])], 1),
    ((4, 6), [("Identity", None)], 0),
    ((3, 4, 6), [], 1),
    ((3, 4, 6), [("Transpose", [0, 2, 1])], 2),
    ((3, 4, 6), [("Transpose", [1, 2, 0])], 2),
    ((3, 4, 6), [("Transpose", [2, 0, 1])], 0),
    # One expert picked: the axes behind it move up, those before stay.
    ((3, 4, 6), [("Gather", (1, 0))], 1),
    ((4, 3, 6), [("Gather", (1, 1))], 0),
    ((4, 6, 3), [("Gather", (1, 2))], 0),
    ((4, 3, 6), [("Gather", (1, 0))], 1),
    # Several picked: one axis comes in the place of one; two for one.
    ((3, 4, 6), [("Gather", ([0, 2], 0))], 1),
    ((3, 4, 6), [("Gather", ([[0, 1], [2, 1]], 0))], 1),
    ((3, 4, 6), [("Gather", ([[0, 1], [2, 1]], 1))], None),
    ((3, 4, 6), [("Gather", ([0, 1], 1))], None),
    ((3, 4, 6), [("Gather", ([0, 1], 2))], 1),
    ((2, 3, 4, 6), [("Gather", ([1], 1)), ("Transpose", [0, 1, 3, 2])], 3),
    ((3, 4, 6), [("GatherND", [[0], [2]])], 1),
    ((2, 3, 4, 6), [("GatherND", [[0, 1], [1, 2]])], 2),
    ((2, 3, 4, 6), [("GatherND", [[0], [1]])], 2),
    ((3, 4), [("GatherND", [[[0], [1]]])], None),
    ((4, 6), [("Unsqueeze", [0])], 0),
    ((4, 6), [("Unsqueeze", [1])], None),
    ((4, 6), [("Unsqueeze", [-1])], 1),
    ((4, 6), [("Unsqueeze", [0, 1])], 0),
    ((4, 6), [("Concat", 1)], 0),
    ((4, 6), [("Softmax", None)], None),
]


@pytest.mark.parametrize(("shape", "moves", "axis"), CASES, ids=[str(case[:2]) for case in CASES])
def test_the_axis_of_the_stored_tensor(shape: tuple[int, ...], moves: list[tuple[str, Any]], axis: int | None) -> None:
    found, _ = summed_axes(graph(shape, moves))
    assert [(s.name, s.axis) for s in found if s.name == "w"] == ([] if axis is None else [("w", axis)])


@pytest.mark.parametrize(("turned", "axis"), [(0, 0), (1, 1)])
@pytest.mark.parametrize("product", ["Gemm", "FusedMatMul"])
def test_a_product_that_turns_its_weight(product: str, turned: int, axis: int) -> None:
    (found,), _ = summed_axes(graph((4, 6), [], product, transB=turned))
    assert (found.axis, found.flat) == (axis, True)


def test_a_product_that_is_not_understood_is_listed() -> None:
    _, lost = summed_axes(graph((4, 6), [], "MatMulNBits"))
    assert lost and "not float weights" in lost[0]


AT = SummedAxis("w", 1, "MatMul", True)


def judged(weight: torch.Tensor, kept: float, pattern: Any = Unstructured("0.5"), asked: Any = None) -> list[str]:  # noqa: B008
    result = Verification(None)  # type: ignore[arg-type]
    judge(result, AT, weight, "dense", Promise(pattern, kept), asked)
    return result.problems


def test_fewer_zeros_than_were_promised() -> None:
    weight = torch.ones(10, 10)
    weight.view(-1)[:50] = 0
    assert not judged(weight, 0.5) and not judged(weight, 0.6), "more zeros than promised are fine"
    assert judged(weight, 0.49) == ["w: 50.0000% zeros, sparsify.json says 51.0000%"]
    weight.view(-1)[0] = 1
    assert len(judged(weight, 0.5)) == 1, "one weight of a hundred"
    assert len(judged(weight, 0.5, NM(2, 4))) == 1


def test_a_site_of_several_tensors_promises_no_share_of_each() -> None:
    site = {"pattern": "50%", "kept": 0.5}
    found = promises({"passes": [{"sites": [{**site, "tensors": ["a", "b"]}, {**site, "tensors": ["c"]}]}]})
    assert {name: promise.kept for name, promise in found.items()} == {"a": 1.0, "b": 1.0, "c": 0.5}
