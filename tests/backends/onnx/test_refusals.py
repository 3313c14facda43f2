"""Every refusal of the ONNX backend, its runner and its reader that other tests do not meet."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest
import torch
from support import vlms
from support.families import build
from torch import nn

import sparsify
from sparsify.backends.onnx.edited import export_graph
from sparsify.backends.onnx.graph import _check_operators
from sparsify.backends.onnx.options import Options
from sparsify.backends.onnx.running.runner import Runner
from sparsify.backends.onnx.running.session import open_session
from sparsify.backends.onnx.running.talk import talk
from sparsify.backends.onnx.storage.attachment import Attachment
from sparsify.backends.onnx.storage.store import GraphStore, load_graph
from sparsify.backends.onnx.tracing.choice import contract_for
from sparsify.backends.onnx.tracing.trace import export_contract
from sparsify.errors import BackendError, CheckpointError, SpecError
from sparsify.frontend.source import open_source
from sparsify.ir.store import MemoryStore


@pytest.fixture
def link(written: Callable[[str, str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(written("llama", "onnx"), tmp_path / "link"))


def test_a_graph_is_exported_in_the_dtype_that_it_has(tmp_path: Path) -> None:
    exported = torch.export.export(nn.Linear(4, 4), (torch.ones(2, 4),))
    with pytest.raises(SpecError, match="computes in the dtype that it was traced with"):
        export_graph(exported, tmp_path / "out", Options(compute="float16"))


def test_operators_of_nobody() -> None:
    x = ir.val("x", ir.DataType.FLOAT, ir.Shape([1]))
    node = ir.node("Fancy", [x], domain="com.example")
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 20, "com.example": 1})
    with pytest.raises(BackendError, match=r"outside the ai\.onnx domain: com\.example::Fancy"):
        _check_operators(ir.Model(graph, ir_version=10))


def test_a_graph_that_does_not_generate(tmp_path: Path) -> None:
    torch.onnx.export(nn.Linear(4, 4), (torch.ones(2, 4),), tmp_path / "x.onnx", dynamo=True, verbose=False)
    with pytest.raises(BackendError, match="without a cache"):
        Runner(tmp_path / "x.onnx")
    with pytest.raises(BackendError, match="this onnxruntime has"):
        open_session(tmp_path / "x.onnx", device="abacus")
    with pytest.raises(CheckpointError, match="no such file"):
        load_graph(tmp_path / "y.onnx")


def test_talking_needs_a_tokenizer_and_a_prompt(link: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"a tokenizer in .* none that loads"):
        next(talk(link, "hello", tokens=2))
    from sparsify.backends.onnx.running import talk as module

    monkeypatch.setattr(module, "folder_tokenizer", lambda folder: lambda text: {"input_ids": []})
    with pytest.raises(SpecError, match="the tokenizer makes no token of it"):
        next(talk(link, "", tokens=2))


def test_a_graphs_weights_are_finished(link: Path) -> None:
    with pytest.raises(CheckpointError, match="is finished"):
        GraphStore(link / "model.onnx").write("lm_head.weight", torch.zeros(1))


def test_a_packed_tensor_that_nothing_unpacks(written: Callable[[str, str], Path], tmp_path: Path) -> None:
    packed = Path(shutil.copytree(written("llama", "onnx:weights=packed,dtype=float16"), tmp_path / "packed"))
    model = ir.load(packed / "model.onnx")
    stem = next(name.removesuffix(".codes") for name in model.graph.initializers if name.endswith(".codes"))
    output = next(n.outputs[0] for n in model.graph if n.outputs[0].name == stem)
    output.name = "another name"
    ir.save(model, packed / "model.onnx")
    with pytest.raises(CheckpointError, match="packed in an unknown way"):
        GraphStore(packed / "model.onnx")


def attachment(folder: Path, store: MemoryStore) -> tuple[Attachment, ir.Value]:
    value = ir.val("w", ir.DataType.FLOAT, ir.Shape([2]))
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 20})
    weights = open_source(nn.Linear(2, 2)).weights.on(store)
    return Attachment(ir.Model(graph, ir_version=10), weights, folder, "external"), value


def test_tensors_that_a_graph_cannot_have(tmp_path: Path) -> None:
    own, value = attachment(tmp_path, MemoryStore(None, {"bias": torch.zeros(2, dtype=torch.complex64)}))
    with pytest.raises(BackendError, match="no file of the checkpoint holds"):
        own.attach({"nowhere": value}, "")
    with pytest.raises(BackendError, match=r"exporting bias to ONNX: dtype torch\.complex64"):
        own.attach({"bias": value}, "")


def test_a_conversion_that_no_operator_does(folder: Callable[[str], Path], tmp_path: Path) -> None:
    weights = open_source(folder("mixtral")).weights
    name = "model.layers.0.mlp.experts.gate_up_proj"
    conversion = weights.conversion(name)
    assert conversion is not None
    conversion.converter.operations = [SimpleNamespace(), *conversion.converter.operations]
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 20})
    own = Attachment(ir.Model(graph, ir_version=10), weights, tmp_path, "external")
    with pytest.raises(BackendError, match="which is not expressed in the graph"):
        own.attach({name: ir.val(name, ir.DataType.FLOAT, ir.Shape([4, 128, 32]))}, "")


class Generating(nn.Module):
    """Says that it generates, and has a forward of some kind."""

    config = None

    def can_generate(self) -> bool:
        return True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_models_whose_cache_cannot_be_an_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(function: Callable[[], Any]) -> Any:
        return function()

    with pytest.raises(BackendError, match="its forward takes no cache"):
        contract_for(Generating(), run, {})
    flat = SimpleNamespace(layers=[SimpleNamespace(keys=torch.zeros(2, 3), values=torch.zeros(2, 3))])
    with pytest.raises(BackendError, match=r"a layer's cache has shape \(2, 3\)"):
        contract_for(build("llama"), lambda function: (None, flat), {})
    with pytest.raises(BackendError, match="its layers keep nothing"):
        contract_for(build("mamba"), lambda function: (None, flat), {})
    with pytest.raises(BackendError, match=r"it does not run on input_0 \[2, 3\]"):
        contract_for(nn.Linear(4, 4), run, {"0": torch.zeros(1, 3)})


def test_a_model_that_cannot_be_traced() -> None:
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    contract = contract_for(Branch(), lambda function: function(), {"0": torch.zeros(1, 4)})
    with pytest.raises(BackendError, match=r"torch\.export cannot trace it"):
        export_contract(contract)


def test_layers_that_keep_nothing_of_text(tmp_path: Path) -> None:
    """Cross-attention reads an image's keys: text alone fills none."""
    config = vlms.build("mllama").config
    config.text_config.cross_attention_layers = [0]
    type(vlms.build("mllama"))(config).save_pretrained(tmp_path / "model")
    with pytest.raises(BackendError, match=r"text alone gives layers \d.* no keys and values.*cache=none"):
        sparsify.compile(tmp_path / "model", [], to="onnx", output=tmp_path / "out")
