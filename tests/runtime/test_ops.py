"""The operators against float64, under torch's compilers, on every instruction set."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.matrices import DTYPES, TOLERANCE, error, pruned, pruned_24
from torch import Tensor, nn

from sparsify.errors import BackendError, SpecError
from sparsify.runtime import ops
from sparsify.runtime.codes import row_starts
from sparsify.runtime.cpu import native, products
from sparsify.runtime.cpu.build import find_compiler
from sparsify.runtime.layout import pack
from sparsify.runtime.packed_weight import PackedWeight
from sparsify.runtime.words import LAYOUTS, Layout

TOKENS = (0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64, 65)


def check_products(shapes: tuple[tuple[int, int], ...], tokens: tuple[int, ...]) -> int:
    """Every layout, dtype, token count, with and without bias; the number of products."""
    count = 0
    for rows, columns in shapes:
        for dtype in DTYPES:
            weights: dict[Layout, Tensor] = {
                "packed24": pruned_24(rows, columns, dtype),
                "bitmask": pruned(rows, columns, 0.5, dtype),
            }
            for layout, weight in weights.items():
                packed, turned = PackedWeight.of(weight, layout), weight.double().t()
                for number in tokens:
                    x, bias = torch.randn(number, columns).to(dtype), torch.randn(rows).to(dtype)
                    got, exact = packed.linear(x), x.double() @ turned
                    assert got.shape == (number, rows)
                    assert error(got, exact) < TOLERANCE[dtype], (layout, rows, columns, dtype, number)
                    got = packed.operator(x, *packed.tensors.values(), bias)
                    assert error(got, exact + bias.double()) < TOLERANCE[dtype], (layout, rows, columns, dtype, number)
                    count += 2
    return count


def test_against_float64_on_ragged_shapes() -> None:
    torch.manual_seed(0)
    assert check_products(((1, 1), (7, 63), (33, 64), (130, 200), (12, 1100), (5, 4160)), TOKENS)


@pytest.fixture
def afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Kernels are looked for anew, in the environment that the test makes, and again after it."""
    for known in (native.library, native.isa):
        known.cache_clear()
    with monkeypatch.context() as patch:
        yield patch
    for known in (native.library, native.isa):
        known.cache_clear()


@pytest.mark.parametrize("isa", ["avx2", "scalar"])
def test_with_a_lower_instruction_set(isa: str, afresh: pytest.MonkeyPatch) -> None:
    kernels = native.library()
    if kernels is None or native.ISAS.index(isa) > kernels.best_isa:
        pytest.skip(f"this machine has no {isa} kernels")
    torch.manual_seed(0)
    afresh.setenv("SPARSIFY_CPU_ISA", isa)
    assert native.ISAS[native.isa()] == isa
    assert check_products(((1, 1), (7, 63), (33, 64), (60, 1100)), (0, 1, 2, 3, 4, 7, 16, 17, 64, 65))


def test_an_instruction_set_that_is_not_here(afresh: pytest.MonkeyPatch) -> None:
    afresh.setenv("SPARSIFY_CPU_ISA", "avx1024")
    with pytest.raises(SpecError, match="no such instruction set"):
        native.isa()


def test_without_a_compiler_one_warning_and_right_results(tmp_path: Path, afresh: pytest.MonkeyPatch) -> None:
    afresh.setattr(native, "BUILT", "none-of-these")
    afresh.setenv("SPARSIFY_CACHE", str(tmp_path))
    afresh.setenv("CXX", "no-such-compiler")
    with pytest.warns(RuntimeWarning, match=r"kernels are not here.*Install a C\+\+ compiler") as seen:
        check_products(((7, 63), (33, 64)), (0, 1, 5, 65))
    assert native.library() is None and sum("kernels" in str(w.message) for w in seen) == 1


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_kernels_are_compiled_once_into_the_cache(real: bool, tmp_path: Path, afresh: pytest.MonkeyPatch) -> None:
    kernels = native.library()
    if find_compiler() is None or kernels is None:
        pytest.skip("no C++ compiler here")
    if not real:
        # One that is quick: it hands out what was compiled earlier.
        compiler = tmp_path / "c++"
        compiler.write_text(f'#!/bin/sh\nfor w; do test "$last" = -o && cp {kernels.path} "$w"; last=$w; done\n')
        compiler.chmod(0o755)
        afresh.setenv("CXX", str(compiler))
    afresh.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    afresh.setattr(native, "BUILT", "none-of-these")
    native.library.cache_clear()
    first = native.library()
    afresh.setenv("CXX", "no-such-compiler")
    native.library.cache_clear()
    second = native.library()
    assert first is not None and second is not None and first.path == second.path
    assert first.path.parent == tmp_path / "cache" and list((tmp_path / "cache").iterdir()) == [first.path]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_values(layout: Layout, dtype: torch.dtype) -> None:
    """Rows and inputs of 1e-30 to 1e30 (as far as the dtype goes), denormals, all-zero and fully dense rows."""
    torch.manual_seed(0)
    weight = pruned_24(16, 256)
    # bfloat16 products of subnormal numbers count as zero (vdpbf16ps): they are beside normal ones here.
    top = 4.0 if dtype is torch.float16 else 30.0
    weight *= 10.0 ** torch.linspace(-top, top, 16)[:, None]
    weight[3] = 0
    if layout == "bitmask":
        weight[5] = torch.randn(256)
    weight[7, weight[7].nonzero()[0]] = 1e-40
    weight = weight.to(dtype)
    packed = PackedWeight.of(weight, layout)
    for number in (1, 4, 16, 65):
        x = (torch.randn(number, 256) * (1.0 if dtype is torch.float16 else 1e3)).to(dtype)
        exact = x.double() @ weight.double().t()
        got = packed.linear(x).double()
        assert not bool(got[:, 3].any())
        finite = exact.abs() < torch.finfo(dtype).max
        scale = (x.double().abs() @ weight.double().abs().t()).clamp(min=float(torch.finfo(dtype).tiny))
        assert bool((((got - exact).abs() / scale)[finite] < TOLERANCE[dtype]).all())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(layout: Layout, dtype: torch.dtype) -> None:
    weight = PackedWeight.of(pruned_24(1030, 512, dtype), layout)
    before = torch.get_num_threads()
    try:
        for number in (1, 2, 4, 7, 16, 64, 100):
            x = torch.randn(number, 512).to(dtype)
            torch.set_num_threads(1)
            one = weight.linear(x)
            torch.set_num_threads(2)
            two = weight.linear(x)
            ours = layout == "packed24" and native.any_number_24(dtype)
            if number > products.MANY and not ours:  # a dense product of torch's, which promises no such thing
                torch.testing.assert_close(one, two)
            else:
                assert torch.equal(one, two), number
    finally:
        torch.set_num_threads(before)


class Layer(nn.Module):
    def __init__(self, layout: Layout, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = PackedWeight.of(pruned_24(96, 130, dtype), layout)
        for name, tensor in self.weight.tensors.items():
            self.register_buffer(f"packed_{name}", tensor)
        self.names = [f"packed_{name}" for name in self.weight.tensors]
        self.register_buffer("bias", torch.randn(96).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        tensors = [getattr(self, name) for name in self.names]
        return torch.relu(self.weight.operator(x, *tensors, self.bias)) + 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_leading_dimensions(layout: Layout) -> None:
    layer, x = Layer(layout), torch.randn(2, 3, 5, 130)
    got = layer(x)
    assert got.shape == (2, 3, 5, 96)
    torch.testing.assert_close(got.view(30, 96), layer(x.view(30, 130)), rtol=1e-4, atol=1e-4)
    assert layer(x[0, 0, 0]).shape == (96,) and layer(x[:0]).shape == (0, 3, 5, 96)
    strided = torch.randn(130, 7).t()
    torch.testing.assert_close(layer(strided), layer(strided.contiguous()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_under_torchs_compilers(layout: Layout) -> None:
    layer, x = Layer(layout), torch.randn(2, 3, 130)
    tensors = [*layer.weight.tensors.values()]
    torch.library.opcheck(layer.weight.operator, (x, *tensors, layer.bias))
    torch.library.opcheck(layer.weight.operator, (x, *tensors))
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
        for tokens in (1, 2, 7, 70):
            batch = torch.randn(2, tokens, 130)
            assert torch.equal(compiled(batch), layer(batch))
    with torch.inference_mode():
        assert torch.equal(compiled(x), layer(x))
    exported = torch.export.export(layer, (x,), dynamic_shapes=({1: torch.export.Dim("tokens", min=1, max=4096)},))
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    module = torch.export.load(file).module()
    for tokens in (1, 9, 80):
        batch = torch.randn(2, tokens, 130)
        assert torch.equal(module(batch), layer(batch))
    traced = torch.fx.symbolic_trace(layer)
    assert torch.equal(traced(x), layer(x))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_under_inductor(layout: Layout) -> None:
    torch._dynamo.reset()
    layer = Layer(layout, torch.bfloat16)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, dynamic=True)
        for tokens in (1, 3, 70):
            batch = torch.randn(2, tokens, 130).bfloat16()
            torch.testing.assert_close(compiled(batch), layer(batch))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_are_each_their_own_product(layout: Layout, dtype: torch.dtype) -> None:
    stack = torch.stack([pruned_24(40, 70, dtype, seed) for seed in range(4)])
    packed = PackedWeight.of(stack, layout)
    x = torch.randn(11, 70).to(dtype)
    offsets = torch.tensor([3, 3, 9, 10], dtype=torch.int32)  # the second expert has no token, the last token no expert
    got = packed.operator(x, *packed.tensors.values(), offsets)
    for expert, (start, end) in enumerate(((0, 3), (3, 3), (3, 9), (9, 10))):
        exact = x[start:end].double() @ stack[expert].double().t()
        assert start == end or error(got[start:end], exact) < TOLERANCE[dtype]
    assert not bool(got[10:].any())
    torch.library.opcheck(packed.operator, (x, *packed.tensors.values(), offsets))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 31, 64, 100, 513])
def test_dense_weights_of_one_token_and_of_more(dtype: torch.dtype, columns: int) -> None:
    weight, bias = torch.randn(37, columns).to(dtype), torch.randn(37).to(dtype)
    for shape in ((1, columns), (1, 1, columns), (columns,), (3, columns), (0, columns)):
        x = torch.randn(shape).to(dtype)
        got = ops.linear_dense(x, weight, bias)
        assert got.shape == (*shape[:-1], 37)
        assert not x.numel() or error(got, x.double() @ weight.double().t() + bias.double()) < TOLERANCE[dtype]
    torch.library.opcheck(ops.linear_dense, (torch.randn(2, columns).to(dtype), weight, bias))


def test_arguments_that_do_not_fit() -> None:
    good = pack(pruned_24(8, 64), "packed24")
    mask = pack(pruned_24(8, 64), "bitmask")
    starts, x = row_starts(mask.codes), torch.randn(2, 64)
    if native.library() is None:
        pytest.skip("the reference path leaves this to torch")
    calls: list[tuple[Any, tuple[Any, ...], str]] = [
        (ops.linear_24, (x.half(), good.values, good.codes), "x of torch.float16, weights of torch.float32"),
        (ops.linear_24, (x.double(), good.values.double(), good.codes), "float64"),
        (ops.linear_24, (torch.randn(2, 200), good.values, good.codes), "not one matrix for x"),
        (ops.linear_24, (torch.randn(100, 200), good.values, good.codes), "not one matrix for x"),
        (ops.linear_24, (x, good.values, good.codes[:4]), "not one matrix"),
        (ops.linear_24, (x, good.values, good.codes, torch.zeros(8).half()), "bias of torch.float16"),
        (ops.linear_bitmask, (x, mask.values, mask.codes, starts[1:]), "not one matrix"),
        (ops.linear_bitmask, (x, mask.values[:-70], mask.codes, starts), "go past the 250 values"),
        (ops.linear_bitmask, (x, mask.values, mask.codes, starts + 1000), "do not count the bits"),
        (ops.linear_bitmask, (x, mask.values, mask.codes.long(), starts), "int64"),
    ]
    for call, arguments, text in calls:
        with pytest.raises(BackendError, match=text):
            call(*arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_reach_inputs_and_biases(layout: Layout) -> None:
    """With one panel of unpacked rows, and with several, which share a buffer."""
    for rows, tokens in ((8, 1), (700, 5), (700, 90)):
        weight = pruned_24(rows, 70)
        packed, bias = PackedWeight.of(weight, layout), torch.randn(rows, requires_grad=True)
        x, target = torch.randn(2, tokens, 70, requires_grad=True), torch.randn(2, tokens, rows)
        got = torch.autograd.grad((packed.operator(x, *packed.tensors.values(), bias) * target).sum(), [x, bias])
        want = torch.autograd.grad((nn.functional.linear(x, weight, bias) * target).sum(), [x, bias])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        alone = torch.autograd.grad((packed.linear(x) * target).sum(), x)
        torch.testing.assert_close(alone[0], want[0], rtol=1e-4, atol=1e-4)


def test_the_gradient_of_packed_values_is_refused() -> None:
    packed = PackedWeight.of(pruned_24(8, 64), "packed24")
    values, codes = (t.clone() for t in packed.tensors.values())
    with pytest.raises(BackendError, match=r"own gradient is asked for.* dequantize"):
        packed.operator(torch.randn(1, 64), values.requires_grad_(), codes, None)
