"""Packing against a slow reference, and back; onnxruntime unpacks to the same bits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.backends.onnx import export_onnx
from sparsify.backends.onnx.backend import ONNX
from sparsify.backends.onnx.options import Dtype
from sparsify.backends.onnx.running.session import open_session
from sparsify.backends.onnx.storage import attachment
from sparsify.backends.onnx.storage.builder import Builder
from sparsify.backends.onnx.storage.pack import best_format, nonzero_bits, pack_tensor, unpack_tensor
from sparsify.backends.onnx.storage.store import GraphStore
from sparsify.backends.verify.runtime_weights import runtime_weights
from sparsify.runtime.codes import pack_bits, unpack_bits

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


@st.composite
def matrices(draw: st.DrawFn) -> torch.Tensor:
    rows, groups = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    width = groups * draw(st.sampled_from([1, 3, 4, 8]))
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(draw(st.integers(0, 999))))
    kind = draw(st.sampled_from(["2:4", "share", "empty", "negative zeros", "dense"]))
    if kind == "2:4" and width % 4 == 0:
        lowest = weight.view(-1, 4).abs().argsort(1)[:, :2]
        weight.view(-1, 4).scatter_(1, lowest, 0)
    elif kind == "share":
        weight[torch.rand(rows, width, generator=torch.Generator().manual_seed(1)) < draw(st.floats(0.3, 1))] = 0
    elif kind == "empty":
        weight.zero_()
    elif kind == "negative zeros":
        weight[:, ::2] = -0.0
    return weight.to(draw(st.sampled_from(DTYPES)))


@settings(max_examples=200, deadline=None)
@given(matrices(), st.booleans())
def test_unpacking_gives_every_bit_back(weight: torch.Tensor, mask: bool) -> None:
    form = best_format(weight)
    if form == "dense" or mask:
        form = "bitmask"
    packed = pack_tensor(weight, form)
    assert torch.equal(bits(unpack_tensor(packed)), bits(weight))
    if form == "2:4":
        assert packed.nbytes == weight.numel() // 8 + weight.numel() // 2 * weight.element_size()
    else:
        kept = max(1, int(nonzero_bits(weight).sum()))
        assert packed.nbytes == -(-weight.numel() // 8) + kept * weight.element_size()


@settings(max_examples=50, deadline=None)
@given(matrices())
def test_the_chosen_format_is_never_larger_than_the_dense_matrix(weight: torch.Tensor) -> None:
    form = best_format(weight)
    if form != "dense":
        assert pack_tensor(weight, form).nbytes <= weight.numel() * weight.element_size()


def test_codes_are_the_positions_that_the_format_says() -> None:
    weight = torch.tensor([[0, 5, 0, 6, 7, 0, 0, 0.0]])
    packed = pack_tensor(weight, "2:4")
    # Group 0 keeps positions 1 and 3, group 1 position 0 and, to fill it, 1.
    assert packed.codes.tolist() == [1 | 3 << 2 | 0 << 4 | 1 << 6]
    assert packed.values.tolist() == [[5, 6], [7, 0]]
    mask = pack_tensor(weight, "bitmask")
    assert mask.codes.tolist() == [0b00011010] and mask.values.tolist() == [5, 6, 7]


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_bits(flags: list[bool]) -> None:
    packed = pack_bits(torch.tensor(flags))
    assert unpack_bits(packed)[: len(flags)].tolist() == flags
    assert packed.numel() == -(-len(flags) // 8)


class Layers(torch.nn.Module):
    """One layer of every kind of zeros."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pairs, self.halved, self.rare = (torch.nn.Linear(64, 64, bias=False) for _ in range(3))
        self.empty, self.odd, self.signed = (torch.nn.Linear(n, 64, bias=False) for n in (64, 20, 64))
        with torch.no_grad():
            self.pairs.weight.view(-1, 4)[:, 1:3] = 0
            self.halved.weight[torch.rand(64, 64) < 0.5] = 0
            self.rare.weight[torch.rand(64, 64) < 0.9] = 0
            self.empty.weight.zero_()
            self.odd.weight[torch.rand(64, 20) < 0.6] = 0
            self.signed.weight.view(-1, 4)[:, 1:3] = -0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.pairs(x) + self.halved(x) + self.rare(x) + self.empty(x) + self.signed(x)
        return y + self.odd(x[:, :20])


@pytest.mark.first(1)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_onnxruntime_unpacks_to_the_same_bits_and_outputs(dtype: Dtype, tmp_path: Path) -> None:
    net, kind = Layers(), getattr(torch, dtype)
    export_onnx(
        net, tmp_path / "packed", backend=ONNX(weights="packed", dtype=dtype), example_inputs=[torch.randn(2, 64)]
    )
    export_onnx(
        net, tmp_path / "dense", backend=ONNX(weights="external", dtype=dtype), example_inputs=[torch.randn(2, 64)]
    )
    store = GraphStore(tmp_path / "packed" / "model.onnx")
    assert store.packed["pairs.weight"] == "2:4" and store.packed["halved.weight"] == "bitmask"
    want = {name: parameter.detach().to(kind) for name, parameter in net.named_parameters()}
    for name, weight in want.items():
        assert torch.equal(bits(store.read(name)), bits(weight)), name
    seen = 0
    for name, got in runtime_weights(store, store.names()):
        # As float32 onnxruntime's scatter and cast keep every value; the sign of a zero is kept too.
        assert torch.equal(bits(got.float()), bits(want[name].float())), name
        seen += 1
    assert seen == len(want)
    x = torch.randn(7, 64).numpy()
    outs = [open_session(tmp_path / n / "model.onnx").run(None, {"input_0": x})[0] for n in ("packed", "dense")]
    assert (outs[0] == outs[1]).all()


@pytest.mark.parametrize(("dtype", "theory"), [("float32", 17 / 32), ("float16", 9 / 16)])
def test_the_file_is_within_two_percent_of_theory(dtype: Dtype, theory: float, tmp_path: Path) -> None:
    net = torch.nn.Linear(512, 512, bias=False)
    for name, cut in (("pairs", lambda w: w.view(-1, 4)[:, :2].zero_()), ("half", lambda w: w[::2].zero_())):
        with torch.no_grad():
            net.reset_parameters()
            cut(net.weight)
        backend = ONNX(weights="packed", dtype=dtype)
        export_onnx(net, tmp_path / name, backend=backend, example_inputs=[torch.randn(2, 512)])
        size = (tmp_path / name / "model.onnx.data").stat().st_size
        assert size <= 1.02 * theory * 512 * 512 * getattr(torch, dtype).itemsize


def shifts_first(build: Builder, key: str, shape: tuple[int, ...], values: Any, codes: Any, wanted: Any) -> Any:
    """The 2:4 unpacking of files written before November 2026."""
    groups, u8, i32 = math.prod(shape) // 4, ir.DataType.UINT8, ir.DataType.INT32
    fours = [groups // 2, 4]
    shifts = build.constant("shifts", np.array([0, 2, 4, 6], np.uint8))
    x = build.node("BitShift", [codes, shifts], f"{key}/shifted", fours, u8, direction="RIGHT")
    x = build.node("BitwiseAnd", [x, build.constant("three", np.array(3, np.uint8))], f"{key}/masked", fours, u8)
    x = build.node("Cast", [build.reshape(x, [groups, 2], f"{key}/pairs")], f"{key}/at", [groups, 2], i32, to=i32)
    zeros = build.zeros([groups, 4], wanted)
    x = build.node("ScatterElements", [zeros, x, values], f"{key}/groups", [groups, 4], wanted, axis=1)
    return build.reshape(x, list(shape), key)


def test_a_file_of_the_older_order_of_operators_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Layers()
    monkeypatch.setattr(attachment, "spread_24", shifts_first)
    export_onnx(net, tmp_path / "out", weights="packed", example_inputs=[torch.randn(2, 64)])
    store = GraphStore(tmp_path / "out" / "model.onnx")
    assert next(n.op_type for n in store.model.graph if n.op_type.startswith("Bit")) == "BitShift"
    for name, parameter in net.named_parameters():
        assert torch.equal(bits(store.read(name)), bits(parameter.detach())), name


def test_what_is_shifted_right_is_a_multiple(tmp_path: Path) -> None:
    """OpenVINO's shift is a division that rounds: tools/check_compilers.py runs it on such a file."""
    export_onnx(Layers(), tmp_path / "out", weights="packed", example_inputs=[torch.randn(2, 64)])
    graph = GraphStore(tmp_path / "out" / "model.onnx").model.graph
    shifted = [node for node in graph if node.op_type == "BitShift"]
    assert shifted
    for node in shifted:
        masking = node.inputs[0].producer()
        assert masking.op_type == "BitwiseAnd"
        masks, shifts = (value.const_value.numpy().astype(int) for value in (masking.inputs[1], node.inputs[1]))
        assert (masks % 2**shifts == 0).all()


def test_nothing_of_the_unpacking_is_left_in_a_session(tmp_path: Path) -> None:
    import onnx
    import onnxruntime as ort

    export_onnx(Layers(), tmp_path / "out", weights="packed", example_inputs=[torch.randn(2, 64)])
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(tmp_path / "out" / "model.onnx", options, providers=["CPUExecutionProvider"])
    kinds = {node.op_type for node in onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph.node}
    assert not kinds & {"ScatterElements", "NonZero", "BitShift", "BitwiseAnd"}


def test_a_sparse_bfloat16_embedding_is_unpacked_where_a_cpu_can(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Embedding(32, 16), torch.nn.Linear(16, 4)).to(torch.bfloat16)
    with torch.no_grad():
        net[0].weight[torch.rand(32, 16) < 0.6] = 0
    export_onnx(net, tmp_path / "out", weights="packed", example_inputs=[torch.zeros(2, 5, dtype=torch.long)])
    ids = torch.randint(32, (3, 7))
    got = open_session(tmp_path / "out" / "model.onnx").run(None, {"input_0": ids.numpy()})[0]
    assert torch.allclose(torch.from_numpy(got), net.float()(ids), atol=1e-5)
