"""onnxruntime's own quantisers and optimiser on our files: what docs/onnx.md says of them."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime as ort
import pytest
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.quantization.onnx_model import ONNXModel
from support.families import inputs
from support.plain_models import save_plain

import sparsify
from sparsify.backends.onnx.running.runner import Runner

FOR_QUANTISERS = "onnx:weights=external,dtype=float32,linear=matmul"


def operators(file: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(str(file), load_external_data=False).graph.node)


def logits(file: Path) -> np.ndarray:
    ids = inputs("llama")["input_ids"].numpy()
    runner = Runner(file, check=False)
    return runner.forward(ids, np.ones_like(ids), runner.empty(len(ids)))[0]


def distance(one: Path, other: Path) -> float:
    """Of the logits, relative to their spread."""
    want = logits(one)
    return float(np.abs(logits(other) - want).max() / want.std())


def to_int8(source: Path, out: Path) -> Path:
    quantize_dynamic(str(source), str(out), weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"])
    return out


def to_int4(model: onnx.ModelProto, out: Path) -> Path:
    quantiser = MatMulNBitsQuantizer(model, bits=4, block_size=16, is_symmetric=True)
    quantiser.process()
    quantiser.model.save_model_to_file(str(out), True)
    return out


@pytest.fixture(autouse=True)
def silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """(onnxruntime's tools leave files where they are run.)"""
    monkeypatch.chdir(tmp_path)
    ort.set_default_logger_severity(4)
    warnings.simplefilter("ignore")


def test_the_file_as_written_becomes_int8(written: Callable[[str, str], Path], tmp_path: Path) -> None:
    source = written("llama", "onnx") / "model.onnx"
    found = to_int8(source, tmp_path / "int8.onnx")
    assert operators(found)["MatMulInteger"] == 15 and "Gemm" not in operators(found)
    assert 1e-5 < distance(source, found) < 0.2
    graph = onnx.load(str(found)).graph
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    pruned = [value for name, value in weights.items() if name.endswith("down_proj.weight_quantized")]
    assert len(pruned) == 2 and all((value == 0).mean() >= 0.5 for value in pruned)


def test_tables_that_a_head_shares_are_not_turned_under_its_feet(
    written: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """The quantiser transposes a Gemm's weight where it lies: GPT-2's embeddings, were its head as the others are."""
    source = written("gpt2", "onnx:opset=20") / "model.onnx"
    found = to_int8(source, tmp_path / "int8.onnx")
    assert operators(found)["MatMulInteger"] == 8 and operators(found)["Gemm"] == 1
    assert 1e-5 < distance(source, found) < 0.2
    # Its defaults (embeddings too) want an opset without an operator called Attention.
    whole = tmp_path / "whole.onnx"
    quantize_dynamic(str(source), str(whole), weight_type=QuantType.QInt8)
    assert operators(whole)["DequantizeLinear"] and distance(source, whole) < 0.3


@pytest.mark.first(1)
@pytest.mark.parametrize("to", ["onnx", FOR_QUANTISERS])
def test_int4(to: str, written: Callable[[str, str], Path], tmp_path: Path) -> None:
    source = written("llama", to) / "model.onnx"
    model = onnx.load(str(source))
    if to == "onnx":
        # As written it holds Gemm, which this quantiser passes over; a helper of onnxruntime's makes MatMul of them.
        helper = ONNXModel(model)
        helper.replace_gemm_with_matmul()
        model = helper.model
    found = to_int4(model, tmp_path / "int4.onnx")
    assert operators(found)["MatMulNBits"] == 15
    assert 1e-4 < distance(source, found) < 0.8


def test_products_of_two_dimensions_are_found_too(tmp_path: Path) -> None:
    """BERT's pooler and classifier read one vector a row."""
    folder = save_plain("bert classifier", tmp_path / "dense")
    sparsify.compile(folder, to=FOR_QUANTISERS, output=tmp_path / "out")
    source = tmp_path / "out" / "model.onnx"
    assert "Gemm" not in operators(source)
    # Six of the one layer, the pooler and the classifier.
    assert operators(to_int4(onnx.load(str(source)), tmp_path / "int4.onnx"))["MatMulNBits"] == 8
    assert operators(to_int8(source, tmp_path / "int8.onnx"))["MatMulInteger"] == 8


@pytest.mark.slow
def test_weights_that_lie_turned_are_found_too(written: Callable[[str, str], Path], tmp_path: Path) -> None:
    """GPT-2's Conv1D."""
    source = written("gpt2", FOR_QUANTISERS) / "model.onnx"
    assert "Gemm" not in operators(source)
    assert operators(to_int4(onnx.load(str(source)), tmp_path / "int4.onnx"))["MatMulNBits"] >= 8


def test_weights_have_one_place_that_says_their_shape(written: Callable[[str, str], Path]) -> None:
    for to in ("onnx", FOR_QUANTISERS):
        graph = onnx.load(str(written("llama", to) / "model.onnx"), load_external_data=False).graph
        assert not {v.name for v in graph.value_info} & {tensor.name for tensor in graph.initializer}


def test_other_tools_of_onnx_read_the_file(written: Callable[[str, str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    for path in written("llama", "onnx").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    source = folder / "model.onnx"
    onnx.checker.check_model(str(source), full_check=True)
    inferred = folder / "inferred.onnx"
    onnx.shape_inference.infer_shapes_path(str(source), str(inferred), check_type=True, strict_mode=True)
    options = ort.SessionOptions()
    # Beside the weights that it points at.
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    ort.InferenceSession(str(source), options)
    for made in (inferred, folder / "optimised.onnx"):
        assert distance(source, made) < 1e-5


@pytest.mark.slow
def test_layers_that_share_their_weights_survive(tmp_path: Path) -> None:
    """ALBERT: one set of weights for all layers, biases and all."""
    sparsify.compile(save_plain("albert", tmp_path / "dense"), to="onnx", output=tmp_path / "out")
    source = tmp_path / "out" / "model.onnx"
    found = to_int8(source, tmp_path / "int8.onnx")
    ids = inputs("bert")["input_ids"].numpy()
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    want = ort.InferenceSession(str(source)).run(["logits"], given)[0]
    got = ort.InferenceSession(str(found)).run(["logits"], given)[0]
    assert np.abs(got - want).max() / want.std() < 0.2
    # What keeps them from it costs nothing: onnxruntime takes each sum back into its product.
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "out" / "optimised.onnx")
    ort.InferenceSession(str(source), options)
    assert operators(source)["Sum"] and not operators(tmp_path / "out" / "optimised.onnx")["Sum"]
