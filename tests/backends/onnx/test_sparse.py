"""``weights=sparse``: products as our operators, with the library and without it, and the way back to dense."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from support.command_line import sparsify as run
from support.folders import load
from support.matrices import pruned, pruned_24
from support.onnx_models import greedy, logits, padded
from torch import nn

from sparsify.backends.onnx.api import export_onnx
from sparsify.backends.onnx.backend import ONNX
from sparsify.backends.onnx.expand import expand
from sparsify.backends.onnx.products.bodies import OPERATORS
from sparsify.backends.onnx.running.runner import Runner
from sparsify.backends.onnx.running.session import open_session
from sparsify.backends.onnx.storage.store import GraphStore
from sparsify.backends.verify.onnx_folder import verify_onnx
from sparsify.errors import CheckpointError, SparsifyError, SpecError
from sparsify.runtime.cpu import native

SPARSE = "onnx:weights=sparse"
pytestmark = pytest.mark.skipif(native.library() is None, reason="no kernels here, and no C++ compiler")


def operators(file: Path) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in onnx.load(file, load_external_data=False).graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts


def without_library(file: Path) -> Any:
    """As a program opens it that knows nothing of us."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


@pytest.mark.first(3)
@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "gpt2",
        *(
            pytest.param(f, marks=pytest.mark.slow)
            for f in ("opt", "qwen2", "mixtral", "falcon", "qwen3_moe", "gpt_oss")
        ),
    ],
)
def test_a_decoder_gives_the_tokens_and_logits_of_transformers(
    family: str, written: Callable[[str, str], Path]
) -> None:
    """Weights with and without biases, of both layouts ([in, out] in GPT-2 and the stacks of gpt-oss), and experts."""
    folder, model = written(family, SPARSE), load(written(family, "hf"))
    ours = operators(folder / "model.onnx")
    assert ours["LinearBitmask"] >= 2 and ("MatMul" not in ours or family in ("falcon", "gpt_oss"))
    assert ("ExpertsBitmask" in ours) == (family in ("mixtral", "qwen3_moe", "gpt_oss"))
    ids, mask = padded()
    want = logits(model, ids, mask).numpy()
    for session in (None, without_library(folder / "model.onnx")):
        runner = Runner(folder, session=session)
        got = np.stack(list(runner.generate(ids.numpy(), mask.numpy(), tokens=40)), 1)
        assert (got == greedy(model, ids, mask, 40)).all()
        whole, _ = runner.forward(ids.numpy(), mask.numpy(), runner.empty(2))
        assert np.abs(whole - want)[mask.numpy() == 1].max() <= 1e-5
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    # The file says the shape of everything, for readers that know no function.
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    known = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in proto.graph.value_info}
    for node in proto.graph.node:
        if node.domain == "sparsify":
            assert known[node.output[0]][1] == next(a.i for a in node.attribute if a.name == "out_features")


@pytest.mark.slow
def test_verify_knows_it_and_expand_makes_it_dense(written: Callable[[str, str], Path], tmp_path: Path) -> None:
    for family in ("llama", "gpt2", "mixtral", "gpt_oss"):
        folder = written(family, SPARSE)
        found = verify_onnx(folder)
        assert found.sound and found.sparse and not found.unchecked, found.problems
        forms = {w.name: w.format for w in found.weights}
        assert {"2:4", "bitmask", "dense"} >= set(forms.values()) and all(w.equal for w in found.weights)
        dense = expand(folder, tmp_path / family)
        assert not set(operators(dense / "model.onnx")) & set(OPERATORS)
        proto = onnx.load(dense / "model.onnx", load_external_data=False)
        assert not proto.functions and [o.domain for o in proto.opset_import] == [""]
        assert verify_onnx(dense).sound
        want = load(written(family, "hf")).state_dict()
        assert all(torch.equal(tensor, want[name]) for name, tensor in load(dense).state_dict().items())


class Layers(nn.Module):
    """Products of every kind that may, and may not, become an operator of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs, self.mask, self.full = nn.Linear(128, 96), nn.Linear(96, 200, bias=False), nn.Linear(200, 40)
        self.few, self.read, self.twice = nn.Linear(40, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        for layer, weight in (
            (self.pairs, pruned_24(96, 128)),
            (self.mask, pruned(200, 96, 0.5)),
            (self.few, pruned(64, 40, 0.2)),
            (self.read, pruned(64, 64, 0.7)),
            (self.twice, pruned(64, 64, 0.7, seed=1)),
        ):
            layer.weight.data = weight
        self.pairs.weight.data[0, 0] = -0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.few(self.full(self.mask(self.pairs(x))))
        return self.twice(self.twice(self.read(y))) + self.read.weight.sum()


def test_what_becomes_an_operator_and_what_stays(tmp_path: Path) -> None:
    net = Layers()
    x = torch.randn(3, 5, 128)
    for dtype, bits in ((None, 4), ("bfloat16", 2)):
        backend = ONNX(weights="sparse", dtype=dtype)
        out = tmp_path / str(dtype)
        notes = export_onnx(net, out, backend=backend, example_inputs=[torch.randn(2, 5, 128)]).notes
        assert operators(out / "model.onnx")["Linear24"] == 1 and operators(out / "model.onnx")["LinearBitmask"] == 3
        store = GraphStore(out / "model.onnx")
        # `read` is summed as well, `full` has no zeros and `few` too few.
        layouts = {name: form.layout for name, form in store.sparse.items()}
        assert layouts == {"pairs.weight": "packed24", "mask.weight": "bitmask", "twice.weight": "bitmask"}
        assert any("sparse: 3 weights" in note and "sparsify.onnx_library()" in note for note in notes)
        values = onnx.load(out / "model.onnx", load_external_data=False).graph.initializer
        assert next(v for v in values if v.name == "pairs.weight.values").dims == [96, 64]
        kept = {name: store.read(name) for name in ("pairs.weight", "mask.weight")}
        for name, weight in kept.items():
            want = net.get_parameter(name).to(torch.bfloat16 if dtype else torch.float32)
            assert torch.equal(weight, want) and weight.element_size() == bits
        assert not bool(torch.signbit(kept["pairs.weight"][0, 0]))
        with torch.no_grad():
            rounded = Layers()
            rounded.load_state_dict(
                {n: p.to(torch.bfloat16).float() if dtype else p for n, p in net.state_dict().items()}
            )
            want = rounded(x).numpy()
        for session in (open_session(out / "model.onnx"), without_library(out / "model.onnx")):
            (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_half_precision_computes_with_half_precision(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 32))
    net[0].weight.data = pruned_24(64, 128)
    net = net.half()
    backend = ONNX(weights="sparse", compute="float16")
    export_onnx(net, tmp_path / "out", backend=backend, example_inputs=[torch.randn(2, 128).half()])
    session = open_session(tmp_path / "out" / "model.onnx")
    assert operators(tmp_path / "out" / "model.onnx")["Linear24"] == 1
    x = torch.randn(4, 128).half()
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        assert np.abs(got.astype(np.float32) - net.float()(x.float()).numpy()).max() < 2e-2


def test_words_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(SpecError, match="linear=matmul"):
        ONNX(weights="sparse", linear="matmul")


def test_the_command_line_runs_it(written: Callable[[str, str], Path], tmp_path: Path) -> None:
    folder = written("llama", SPARSE)
    verified = run("verify", folder, "--json")
    assert verified.returncode == 0 and json.loads(verified.stdout)["sparse"] is True
    shown = run("verify", folder)
    assert "onnx_library" in shown.stdout and "after import sparsify" not in shown.stdout
    assert run("expand", folder, "-o", tmp_path / "dense", "-q").returncode == 0


BROKEN: dict[str, Callable[[onnx.ModelProto], None]] = {}


def broken(function: Callable[[onnx.ModelProto], None]) -> Callable[[onnx.ModelProto], None]:
    BROKEN[function.__name__] = function
    return function


def _ours(model: onnx.ModelProto) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.domain == "sparsify")


def _attribute(node: onnx.NodeProto, name: str) -> onnx.AttributeProto:
    return next(a for a in node.attribute if a.name == name)


@broken
def rows_past_all_memory(model: onnx.ModelProto) -> None:
    _attribute(_ours(model), "out_features").i = 1 << 39


@broken
def fewer_rows(model: onnx.ModelProto) -> None:
    _attribute(_ours(model), "out_features").i -= 1


@broken
def no_sizes(model: onnx.ModelProto) -> None:
    del _ours(model).attribute[:]


@broken
def sizes_of_another_kind(model: onnx.ModelProto) -> None:
    node = _ours(model)
    del node.attribute[:]
    node.attribute.extend(onnx.helper.make_attribute(name, 0.5) for name in ("in_features", "out_features"))


@broken
def codes_of_another_weight(model: onnx.ModelProto) -> None:
    nodes = [node for node in model.graph.node if node.domain == "sparsify"]
    nodes[0].input[2] = nodes[-1].input[2]


@broken
def values_cut_short(model: onnx.ModelProto) -> None:
    name = _ours(model).input[1]
    next(v for v in model.graph.initializer if v.name == name).dims[0] -= 1


@broken
def no_codes(model: onnx.ModelProto) -> None:
    del _ours(model).input[2:]


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_graph_is_refused_by_everyone_who_reads_it(
    case: str, written: Callable[[str, str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(written("llama", SPARSE), folder)
    (folder / "sparsify.json").unlink()
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    BROKEN[case](model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(SparsifyError):
        open_session(folder / "model.onnx")
    with pytest.raises(SparsifyError):
        store = GraphStore(folder / "model.onnx")
        for name in store.names():
            store.read(name)
        # What every weight is read from may be whole, and a product read another's.
        open_session(folder / "model.onnx")
    with contextlib.suppress(CheckpointError):
        assert not verify_onnx(folder).sound


def test_one_flipped_bit_is_seen(written: Callable[[str, str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(written("llama", SPARSE), folder)
    data = bytearray((folder / "model.onnx.data").read_bytes())
    store = GraphStore(folder / "model.onnx")
    name = next(iter(store.sparse))
    data[store.model.graph.initializers[f"{name}.values"].const_value.offset] ^= 1
    (folder / "model.onnx.data").write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"model\.onnx\.data"):
        Runner(folder)
    assert any(name in problem for problem in verify_onnx(folder).problems)
