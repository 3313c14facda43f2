"""Graphs of one of our operators, for the tests of the library that onnxruntime is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper
from support.matrices import pruned, pruned_24
from torch import Tensor

import sparsify
from sparsify.runtime.layout import Packed, pack
from sparsify.runtime.words import Layout

KINDS = {
    torch.float32: TensorProto.FLOAT,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float16: TensorProto.FLOAT16,
    torch.uint8: TensorProto.UINT8,
    torch.int8: TensorProto.INT8,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
}
# Types of x, and of values or scales.
PAIRS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
]
NAMES = {"packed24": "Linear24", "bitmask": "LinearBitmask"}


def matrix(layout: Layout, rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    if layout == "packed24":
        return pruned_24(rows, columns, dtype, seed)
    return pruned(rows, columns, 0.6, dtype, seed)


def parts_of(weight: Tensor | Packed, layout: Layout) -> dict[str, Tensor]:
    """What the operators read of a weight, in their order."""
    packed = weight if isinstance(weight, Packed) else pack(weight, layout)
    codes = {} if layout == "dense" else {"codes": packed.codes.view(torch.uint8)}
    scales = {} if packed.scales is None else {"scales": packed.scales}
    return {"values": packed.values} | codes | scales


def graph_of(
    operator: str,
    parts: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    given: torch.dtype = torch.float32,
    *,
    width: int | None = None,
    free: str = "",
) -> onnx.ModelProto:
    """x float32, cast to ``given``, through the operator, and back.

    Args:
        operator: its name, or the layout of one of full width.
        parts: its other inputs, in their order. sizes: its attributes. width: of x, where not as they say.
        free: one of ``parts`` that is an input of the graph, and no constant.
    """
    names = ["x_given", *parts]
    nodes = [
        helper.make_node("Cast", ["x"], ["x_given"], to=KINDS[given]),
        helper.make_node(NAMES.get(operator, operator), names, ["y_given"], domain="sparsify", name="here", **sizes),
        helper.make_node("Cast", ["y_given"], ["y"], to=TensorProto.FLOAT),
    ]
    constants = [_constant(name, part) for name, part in parts.items() if name != free]
    width = sizes.get("in_features", 1) if width is None else width
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", width])]
    inputs += [helper.make_tensor_value_info(n, KINDS[p.dtype], p.shape) for n, p in parts.items() if n == free]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, None])]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("sparsify", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def open_graph(model: onnx.ModelProto, threads: int = 1, *, library: bool = True) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    if library:
        options.register_custom_ops_library(sparsify.onnx_library())
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def multiply(session: Any, x: Tensor) -> Tensor:
    (y,) = session.run(["y"], {"x": x.float().numpy()})
    return torch.from_numpy(np.asarray(y))


def _constant(name: str, part: Tensor) -> onnx.TensorProto:
    content = part.contiguous().view(torch.uint8).numpy().tobytes() if part.numel() else b""
    return helper.make_tensor(name, KINDS[part.dtype], list(part.shape), content, raw=True)
