"""The operator: its reference, its CUDA path with the kernels emulated, and torch's compilers around it."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.gpus import A100, H200, Emulated, on_gpu, prepared
from support.machine_code import machine_code
from support.matrices import error, pruned_24
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import sparsify.runtime.ops  # noqa: F401
from sparsify.errors import BackendError
from sparsify.runtime.cuda import driver, ops, products
from sparsify.runtime.cuda.dispatch import Plan
from sparsify.runtime.cuda.gpu import GPU
from sparsify.runtime.cuda.prepared import PreparedWeight, prepare_weight
from sparsify.runtime.layout import concatenate, pack
from sparsify.runtime.words import Policy


@pytest.mark.parametrize(("policy", "target"), [("decode", H200), ("prefill", A100), ("both", A100)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reference_against_float64(policy: Policy, target: GPU, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dense, weight = prepared(64, 192, policy, target, dtype=dtype)
    for shape in ((0, 192), (1, 192), (3, 5, 192), (192,)):
        x, bias = torch.randn(shape).to(dtype), torch.randn(64).to(dtype)
        assert weight.linear(x).shape == (*shape[:-1], 64)
        assert error(weight.linear(x, bias), x.double() @ dense.double().t() + bias.double()) < 4e-3


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[torch.dtype, Emulated]:
    """Kernels are emulated; ``ops._cuda`` is what a GPU would call."""
    modules = {dtype: Emulated(dtype) for dtype in (torch.bfloat16, torch.float16)}
    monkeypatch.setattr(driver, "module", lambda dtype, device: modules[dtype])
    return modules


def test_the_cuda_path_by_count(gpu: dict[torch.dtype, Emulated]) -> None:
    torch.manual_seed(0)
    for dtype in gpu:
        dense, weight = prepared(40, 600, dtype=dtype)
        bias = torch.randn(40).to(dtype)
        for shape in ((1, 600), (2, 4, 600), (600,), (16, 600), (20, 600), (300, 600), (0, 600)):
            x = torch.randn(shape).to(dtype)
            y = on_gpu(weight, x, bias)
            assert y.is_contiguous() and y.shape == (*shape[:-1], 40)
            assert error(y, x.double() @ dense.double().t() + bias.double()) < 4e-3, shape
            if x.numel():
                kernel = Plan.parse(str(weight.plan)).kernel(x.numel() // 600)
                assert gpu[dtype].launched[-1] == kernel.partition("_s")[0] if "_s" not in kernel else "add_splits"


def test_inputs_off_their_boundaries(gpu: dict[torch.dtype, Emulated]) -> None:
    """Widths that are no multiple of eight, views that begin anywhere, transposed inputs."""
    torch.manual_seed(0)
    for columns in (3, 60, 260):
        dense, weight = prepared(24, columns)
        x = torch.randn(3, columns + 1).bfloat16()[:, 1:]
        flipped = torch.randn(columns, 3).bfloat16().t()
        shifted = torch.randn(3 * columns + 1).bfloat16()[1:].view(3, columns)
        for given in (x, flipped, shifted, shifted.expand(2, 3, columns)):
            exact = given.double() @ dense.double().t()
            assert error(on_gpu(weight, given), exact) < 4e-3
            assert error(on_gpu(weight, given, plan="*:unpack"), exact) < 4e-3
            assert error(on_gpu(weight, given, plan="*:tiled_w4_r1_m4"), exact) < 4e-3


def test_a_dense_copy_in_parts(gpu: dict[torch.dtype, Emulated], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "WORKSPACE", 32 * 264 * 2)
    dense, weight = prepared(70, 260)
    x, bias = torch.randn(5, 260).bfloat16(), torch.randn(70).bfloat16()
    for b in (None, bias):
        exact = x.double() @ dense.double().t() + (0 if b is None else b.double())
        assert error(on_gpu(weight, x, b, "*:unpack"), exact) < 4e-3
    assert gpu[torch.bfloat16].launched == ["unpack"] * 6


def test_splits_are_added_with_the_bias_once(gpu: dict[torch.dtype, Emulated]) -> None:
    dense, weight = prepared(20, 1024)
    x, bias = torch.randn(33, 1024).bfloat16(), torch.randn(20).bfloat16()
    y = on_gpu(weight, x, bias, "*:tiled_w4_r1_m8_s4")
    assert error(y, x.double() @ dense.double().t() + bias.double()) < 4e-3
    assert gpu[torch.bfloat16].launched == ["tiled_w4_r1_m8", "add_splits"]


def test_siblings_as_one_matrix_give_the_same_bits(gpu: dict[torch.dtype, Emulated]) -> None:
    dense = [pruned_24(rows, 320, torch.bfloat16, seed=rows) for rows in (48, 16, 16)]
    joined = prepare_weight(concatenate([pack(d, "packed24") for d in dense]), target=H200)
    assert isinstance(joined, PreparedWeight)
    x = torch.randn(4, 320).bfloat16()
    parts = on_gpu(joined, x).split([48, 16, 16], -1)
    for d, part in zip(dense, parts, strict=True):
        alone = prepare_weight(pack(d, "packed24"), target=H200)
        assert isinstance(alone, PreparedWeight)
        assert torch.equal(on_gpu(alone, x), part)


def test_what_the_cuda_path_refuses(gpu: dict[torch.dtype, Emulated]) -> None:
    _, weight = prepared(32, 64)
    x = torch.randn(2, 64)
    with pytest.raises(BackendError, match="float32"):
        on_gpu(weight, x)
    with pytest.raises(BackendError, match=r"bias of torch\.float32"):
        on_gpu(weight, x.bfloat16(), torch.randn(32))
    with pytest.raises(BackendError, match="compressed"):
        on_gpu(weight, x.bfloat16(), plan="*:cusparselt:0")
    with pytest.raises(BackendError, match="columns"):
        on_gpu(weight, torch.randn(2, 600).bfloat16())
    with pytest.raises(BackendError, match="no kernel"):
        on_gpu(weight, x.bfloat16(), plan="*:quick")
    assert gpu[torch.bfloat16].launched == []


def test_without_nvrtc_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "module", lambda dtype, device: None)
    _, weight = prepared(32, 64)
    with pytest.raises(BackendError, match="nvidia-cuda-nvrtc"):
        on_gpu(weight, torch.randn(2, 64).bfloat16())


class Net(nn.Module):
    """Two products over prepared weights, as a lowered graph has them."""

    def __init__(self) -> None:
        super().__init__()
        (_, one), (_, two) = prepared(64, 128), prepared(32, 64, "both", A100)
        self.register_buffer("fragments", one.fragments)
        for name, tensor in two.tensors.items():
            self.register_buffer(f"two_{name}", tensor)
        self.plans = str(one.plan), str(two.plan)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        x = torch.relu(ops.linear_24_prepared(x, self.fragments, None, None, 64, self.plans[0], bias))
        return ops.linear_24_prepared(x, self.two_fragments, self.two_compressed, self.two_codes, 32, self.plans[1])


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compilers_take_it_whole(backend: str) -> None:
    net, x = Net(), torch.randn(6, 128).bfloat16()
    wanted = net(x)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=backend)
    assert torch.equal(compiled(x), wanted) and torch.equal(compiled(x[:3]), wanted[:3])
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("tokens")},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(x[:2]), wanted[:2])
    traced = torch.fx.symbolic_trace(net)
    assert torch.equal(traced(x), wanted)


def test_opcheck() -> None:
    _, weight = prepared(32, 64)
    x, bias = torch.randn(3, 64).bfloat16(), torch.randn(32).bfloat16()
    *tensors, rows, plan = weight.arguments(weight.tensors)
    for b in (None, bias):
        torch.library.opcheck(ops.linear_24_prepared, (x, *tensors, rows, plan, b))


def test_fake_cuda_tensors_go_through_export() -> None:
    """What a compiler sees of it on a machine with a GPU."""
    net = Net()
    with FakeTensorMode():
        for name, buffer in net.named_buffers():
            net.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda"))
        x, bias = torch.empty(6, 128, dtype=torch.bfloat16, device="cuda"), torch.empty(64, device="cuda").bfloat16()
        y = net(x, bias)
        assert y.device.type == "cuda" and y.shape == (6, 32) and y.dtype is torch.bfloat16
        program = torch.export.export(net, (x, bias), dynamic_shapes=({0: torch.export.Dim("tokens")}, None))
    calls = [node for node in program.graph.nodes if node.target is ops.linear_24_prepared]
    assert len(calls) == 2 and all(node.meta["val"].device.type == "cuda" for node in calls)


@pytest.mark.slow
def test_triton_kernels_under_its_interpreter() -> None:
    pytest.importorskip("triton")
    code = """
import torch
from support.matrices import error, pruned_24
from sparsify.runtime.cuda import triton_kernels
from sparsify.runtime.layout import pack
torch.manual_seed(0)
for dtype in (torch.bfloat16, torch.float16):
    for rows, columns in ((9, 1024), (5, 60), (33, 320)):
        dense = pruned_24(rows, columns, dtype)
        dense.view(-1)[torch.randperm(dense.numel())[: dense.numel() // 10]] = 0
        packed = pack(dense, "packed24")
        for tokens in (1, 7, 16):
            x, bias = torch.randn(tokens, columns).to(dtype), torch.randn(rows).to(dtype)
            for b in (None, bias):
                y = triton_kernels.linear(x, packed.values, packed.codes, b)
                exact = x.double() @ dense.double().t() + (0 if b is None else b.double())
                # The interpreter cuts bfloat16 off where a GPU rounds.
                bar = 8e-3 if dtype is torch.bfloat16 else 4e-3
                assert error(y, exact) < bar, (dtype, rows, columns, tokens, error(y, exact))
print("checked")
"""
    tests = str(Path(__file__).parents[2])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": tests}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0 and "checked" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize("architecture", [80, 90])
def test_triton_kernels_compile_for_gpus(tmp_path: Path, architecture: int) -> None:
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from sparsify.runtime.cuda import triton_kernels

    pointers = {"w": "*i32", "x": "*bf16", "bias": "*bf16", "y": "*bf16", "rows": "i32", "groups": "i32"}
    flags = {"FLOAT16": False, "BIAS": True}
    cases = [
        (triton_kernels.one_token, pointers | {"codes": "*i16"}, flags | {"ROWS": 4, "GROUPS": 256}),
        (
            triton_kernels.few_tokens,
            pointers | {"codes": "*u8", "tokens": "i32"},
            flags | {"ROWS": 32, "GROUPS": 64, "TOKENS": 16, "WIDE": False},
        ),
    ]
    for kernel, types, constants in cases:
        names = list(kernel.arg_names)
        signature = {name: types.get(name, "constexpr") for name in names}
        divisible = {(names.index(n),): [["tt.divisibility", 16]] for n in types}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible)
        compiled = compile(source, target=GPUTarget("cuda", architecture, 32))
        (tmp_path / "k.cubin").write_bytes(compiled.asm["cubin"])
        (words,) = machine_code(tmp_path / "k.cubin").values()
        assert not [w for w in words if w.startswith(("LDL", "STL"))]
        if kernel is triton_kernels.one_token:
            assert any(w.startswith("LDG") and ".128" in w for w in words)
        else:
            assert any(w.startswith(("HMMA", "HGMMA")) for w in words)
