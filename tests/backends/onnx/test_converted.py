"""Weights that transformers makes of a checkpoint's by more than names, made by the graph: against transformers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor
from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist, Transpose

from sparsify.backends.onnx.storage.builder import Builder
from sparsify.backends.onnx.storage.converted import convert
from sparsify.errors import BackendError
from sparsify.ir.weights import Conversion


def made(folder: Path, operations: list[Any], parts: list[list[Tensor]], wanted: dict[str, Tensor], name: str) -> Any:
    """``name`` of ``wanted`` as a graph makes it of ``parts``."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 20}, name="weights")
    build = Builder(graph)
    values = [
        [build.initializer(f"part.{i}.{j}", ir.tensor(part.numpy())) for j, part in enumerate(some)]
        for i, some in enumerate(parts)
    ]
    sources = [("?", str(i)) for i, some in enumerate(parts) for _ in some]
    shapes = {target: tensor.shape for target, tensor in wanted.items()}
    conversion = Conversion(SimpleNamespace(operations=operations), sources, list(wanted), shapes)
    graph.outputs.append(convert(build, name, conversion, values, ir.DataType.FLOAT))
    ir.save(ir.Model(graph, ir_version=10), folder / "x.onnx")
    return ort.InferenceSession(folder / "x.onnx").run(None, {})[0]


def test_pieces_turns_and_joints(tmp_path: Path) -> None:
    whole, q, k = torch.randn(6, 4), torch.randn(4, 3), torch.randn(2, 3)
    halves = dict(zip(("gate", "up"), whole.chunk(2), strict=True))
    for name, want in halves.items():
        assert np.array_equal(made(tmp_path, [Chunk(dim=0)], [[whole]], halves, name), want.numpy())
    turned = {"w": whole.t()}
    assert np.array_equal(made(tmp_path, [Transpose(0, 1)], [[whole]], turned, "w"), turned["w"].numpy())
    for wanted in (whole, whole.t()):
        got = made(tmp_path, [Transpose(0, 1, check_dims=True)], [[whole]], {"w": wanted}, "w")
        assert np.array_equal(got, wanted.numpy())
    joint = {"w": torch.cat([q, k])}
    assert np.array_equal(made(tmp_path, [Concatenate(dim=0)], [[q], [k]], joint, "w"), joint["w"].numpy())
    experts = {"w": torch.cat([torch.stack([q, q + 1]), torch.stack([q + 2, q + 3])], 1)}
    steps = [MergeModulelist(dim=0), Concatenate(dim=1)]
    got = made(tmp_path, steps, [[q, q + 1], [q + 2, q + 3]], experts, "w")
    assert np.array_equal(got, experts["w"].numpy())


def test_pieces_of_their_own_sizes(tmp_path: Path) -> None:
    core = pytest.importorskip("transformers.core_model_loading")
    if not hasattr(core, "Split"):
        pytest.skip("a transformers without Split")
    whole = torch.randn(7, 4)
    pieces = dict(zip("qkv", whole.split([4, 2, 1]), strict=True))
    for name, want in pieces.items():
        assert np.array_equal(made(tmp_path, [core.Split(dim=0)], [[whole]], pieces, name), want.numpy())


def test_what_would_have_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="which is not expressed in the graph"):
        made(tmp_path, [Transpose(0, 1)], [[torch.randn(6, 4)]], {"w": torch.randn(6, 4)}, "w")
