"""The operators over values of 8 and 4 bits against float64, on every instruction set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.few_bits import EXPERTS, LAYOUTS, Few, few, pack_few
from support.kernels import isas, running
from support.matrices import DTYPES, TOLERANCE, error
from torch import Tensor, nn

from sparsify.errors import BackendError
from sparsify.runtime import ops, reference
from sparsify.runtime.cpu import native
from sparsify.runtime.cpu.few import unpack_few
from sparsify.runtime.few_arguments import GROUPS

BITS = (8, 4)
EVERY = pytest.mark.parametrize("layout", LAYOUTS)
EACH = pytest.mark.parametrize("bits", BITS)


def unpacked(w: Few) -> Tensor:
    scales, values, *codes = w.tensors
    return unpack_few(w.layout, scales, values, *(codes + [None] * 2)[:2], w.bits, w.group, w.dense.shape[1])


def bound(w: Few, x: Tensor) -> Tensor:
    """How far from the product of ``x`` with scale times integer the quantised one may be."""
    group = w.group or 128
    columns = x.shape[1]
    each = torch.nn.functional.pad(x.double().abs(), (0, -columns % group)).view(len(x), -(-columns // group), group)
    step = (each.amax(-1) / 127).repeat_interleave(group, 1)[:, :columns]
    weight, rounding = w.unrounded.abs().t(), torch.finfo(x.dtype).eps
    truth = x.double() @ w.unrounded.t()
    # Half a step of each input; the sums of float32; the result, rounded once.
    return step / 2 @ weight + 2e-6 * (x.double().abs() @ weight) + rounding * truth.abs() + 1e-7


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Few, int, int]:
    """A matrix, a number of tokens, a seed."""
    columns = draw(st.one_of(st.integers(1, 300), st.sampled_from((64, 128, 1024, 1100, 2176))))
    rows = draw(st.one_of(st.integers(1, 14), st.just(40)))
    zeros = draw(st.sampled_from((0.0, 0.5, 0.97, 1.0)))
    layout, bits = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(BITS))
    group, dtype = draw(st.sampled_from(GROUPS)), draw(st.sampled_from(DTYPES))
    seed = draw(st.integers(0, 99))
    return few(layout, rows, columns, bits, group, dtype, seed, zeros), draw(st.integers(0, 18)), seed


@settings(max_examples=100, deadline=None)
@given(matrices(), st.booleans())
def test_quantised_within_half_a_step_of_each_input(case: tuple[Few, int, int], biased: bool) -> None:
    w, tokens, seed = case
    rows, columns = w.dense.shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator).to(w.dense.dtype)
    bias = torch.randn(rows, generator=generator).to(x.dtype) if biased else None
    # More than 16 tokens are multiplied with the weights as they are rounded.
    truth = x.double() @ (w.unrounded if tokens <= 16 else w.dense.double()).t()
    truth = truth if bias is None else truth + bias.double()
    allowed = bound(w, x) + torch.finfo(x.dtype).eps * truth.abs()
    for isa in isas():
        with running(isa):
            got = w.linear(x, False, bias)
            assert got.shape == (tokens, rows) and got.dtype is x.dtype
            assert bool(((got.double() - truth).abs() <= allowed).all()), isa


@settings(max_examples=100, deadline=None)
@given(matrices())
def test_exact_is_as_near_as_the_kernels_of_full_width(case: tuple[Few, int, int]) -> None:
    w, tokens, seed = case
    rows, columns = w.dense.shape
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)).to(w.dense.dtype)
    truth = x.double() @ w.dense.double().t()
    scale = x.double().abs() @ w.dense.double().abs().t()
    for isa in isas():
        with running(isa):
            got = w.linear(x, True)
            assert got.shape == (tokens, rows)
            assert bool(((got.double() - truth).abs() <= TOLERANCE[x.dtype] * scale + 1e-7).all()), isa


@settings(max_examples=100, deadline=None)
@given(matrices())
def test_unpacked_bit_for_bit(case: tuple[Few, int, int]) -> None:
    w = case[0]
    scales, values, *codes = w.tensors
    codes = codes or [None]
    plain = reference.unpack_few(w.layout, scales, values, codes[0], w.bits, w.group, w.dense.shape[1])
    assert torch.equal(plain, w.dense) and not bool(plain.signbit()[plain == 0].any())
    for isa in isas():
        with running(isa):
            found = unpacked(w)
            assert torch.equal(found, plain) and torch.equal(found.signbit(), plain.signbit()), isa


@EVERY
@EACH
@pytest.mark.parametrize(("exact", "group"), [(False, 64), (True, 64), (False, 32), (False, 128), (False, 0)])
def test_the_same_bits_for_any_threads_and_neighbours(layout: str, bits: int, exact: bool, group: int) -> None:
    w = few(layout, 530, 260, bits, group, torch.bfloat16)
    x = torch.randn(16, 260).bfloat16()
    x[5, 7] = float("inf")  # which is multiplied in another way
    for isa in isas():
        with running(isa):
            all_at_once = w.linear(x, exact)
            one_by_one = torch.cat([w.linear(row, exact) for row in x.split(1)])
        with running(isa, threads=2):
            by_two = [w.linear(x, exact), torch.cat([w.linear(part, exact) for part in x.split(7)])]
        for other in (one_by_one, *by_two):
            assert torch.equal(all_at_once.view(torch.int16), other.view(torch.int16)), isa


@EVERY
@EACH
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 17])
def test_inputs_that_are_not_finite(layout: str, bits: int, dtype: torch.dtype, tokens: int) -> None:
    """What the dense product gives: zero times infinity is NaN where a weight was pruned."""
    w = few(layout, 12, 200, bits, 32, dtype)
    for values in ([float("inf")], [float("-inf")], [float("nan")], [float("inf"), float("inf"), float("-inf")]):
        x = torch.randn(tokens, 200).to(dtype)
        for place, value in enumerate(values):
            x[tokens // 2, 9 + 50 * place] = value
        truth = x.double() @ w.dense.double().t()
        for isa in isas():
            with running(isa):
                got = w.linear(x).double()
                assert torch.equal(got.isnan(), truth.isnan()) and torch.equal(got.isinf(), truth.isinf()), isa
                assert torch.equal(got[got.isinf()], truth[truth.isinf()])
                fine = truth.isfinite()
                assert not fine.any() or error(got[fine], truth[fine]) < 0.02


@EVERY
@EACH
def test_inputs_of_any_size(layout: str, bits: int) -> None:
    """From those whose quotients would overflow to those whose products would."""
    w = few(layout, 6, 256, bits, 32)
    x = torch.randn(9, 256) * 10.0 ** torch.tensor([-44.0, -38.0, -30.0, -9.0, 0.0, 9.0, 18.0, 21.0, 30.0])[:, None]
    x[3, 32:64] = 0
    x[4, :32] *= 1e-36
    for isa in isas():
        with running(isa):
            assert bool(((w.linear(x).double() - x.double() @ w.unrounded.t()).abs() <= bound(w, x)).all()), isa
            assert not bool(w.linear(torch.zeros(2, 256)).any())


@EVERY
def test_a_group_of_zeros_stays_zero_whatever_its_scale(layout: str) -> None:
    integers = torch.zeros(3, 256, dtype=torch.long)
    integers[:, 200] = 3
    scales = torch.full((3, 4), 60000.0)
    w = pack_few(integers, scales, layout, 8, 64)
    x = torch.randn(2, 256) * 1e18
    for isa in isas():
        with running(isa):
            got = w.linear(x).double()
            assert bool(((got - x.double() @ w.unrounded.t()).abs() <= bound(w, x)).all()), isa


class Layer(nn.Module):
    def __init__(self, w: Few) -> None:
        super().__init__()
        self.few = w
        for place, tensor in enumerate(w.tensors):
            self.register_buffer(f"part_{place}", tensor)
        self.register_buffer("bias", torch.randn(len(w.dense)))

    def forward(self, x: Tensor) -> Tensor:
        tensors = [getattr(self, f"part_{place}") for place in range(len(self.few.tensors))]
        got: Tensor = self.few.operator(x, *tensors, self.few.bits, self.few.group, False, self.bias)
        return torch.relu(got) + 1


@pytest.mark.first(2)
@EVERY
@EACH
def test_under_torchs_compilers(layout: str, bits: int) -> None:
    w = few(layout, 24, 130, bits, 64)
    torch._dynamo.reset()
    layer, x = Layer(w), torch.randn(2, 3, 130)
    torch.library.opcheck(w.operator, (x, *w.tensors, bits, 64, False, layer.bias))
    torch.library.opcheck(w.operator, (x, *w.tensors, bits, 64, True))
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
        for tokens in (1, 7, 20):
            batch = torch.randn(2, tokens, 130)
            assert torch.equal(compiled(batch), layer(batch))
    exported = torch.export.export(layer, (x,), dynamic_shapes=({1: torch.export.Dim("tokens", min=1, max=99)},))
    assert torch.equal(exported.module()(x[:, :1]), layer(x[:, :1]))
    assert torch.equal(torch.fx.symbolic_trace(layer)(x), layer(x))
    assert layer(x[0, 0]).shape == (24,) and layer(x[:0]).shape == (0, 3, 24)
    strided = torch.randn(130, 7).t()
    assert torch.equal(layer(strided), layer(strided.contiguous()))


def stacked(experts: list[Few]) -> list[Tensor]:
    """The tensors of matrices as those of a stack."""
    parts = [list(parts) for parts in zip(*(w.tensors for w in experts), strict=True)]
    if experts[0].layout != "bitmask":
        return [torch.stack(part) for part in parts]
    scales, values, masks, starts = parts
    ends = torch.tensor([0, *(len(v) - 64 for v in values)]).cumsum(0)
    held = torch.cat([*(v[:-64] for v in values), values[-1][-64:]])
    moved = [s[:-1] + end for s, end in zip(starts, ends, strict=False)]
    return [torch.stack(scales), held, torch.stack(masks), torch.cat([*moved, ends[-1:]])]


@EVERY
@EACH
@pytest.mark.parametrize("group", [0, 32])
def test_experts_are_each_their_own_product(layout: str, bits: int, group: int) -> None:
    experts = [few(layout, 10, 70, bits, group, seed=seed) for seed in range(4)]
    tensors, x = stacked(experts), torch.randn(30, 70)
    offsets = torch.tensor([3, 3, 9, 29], dtype=torch.int32)  # the second has no token, the fourth more than 16
    for exact in (False, True):
        got = EXPERTS[layout](x, *tensors, bits, group, exact, offsets)
        for w, start, end in zip(experts, (0, 3, 3, 9), offsets.tolist(), strict=True):
            assert torch.equal(got[start:end], w.linear(x[start:end], exact))
        assert not bool(got[29:].any())
    torch.library.opcheck(EXPERTS[layout], (x, *tensors, bits, group, True, offsets))
    plain = getattr(reference, EXPERTS[layout].__name__.split(".")[0])
    torch.testing.assert_close(plain(x, *tensors, bits, group, True, offsets), got, rtol=1e-4, atol=1e-5)


@EVERY
@EACH
def test_without_kernels_the_plain_product(layout: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w = few(layout, 9, 150, bits, 64)
    monkeypatch.setattr(native, "library", lambda: None)
    x = torch.randn(3, 150)
    assert error(w.linear(x), x.double() @ w.dense.double().t()) < 1e-6
    assert torch.equal(unpacked(w), w.dense)


def test_arguments_that_do_not_fit() -> None:
    w24, mask, dense = (few(layout, 8, 130, 4, 64) for layout in LAYOUTS)
    x, few_24 = torch.randn(2, 130), ops.linear_24_few
    scales, values, meta = w24.tensors
    m_scales, m_values, m_mask, starts = mask.tensors
    d_scales, d_values = dense.tensors
    calls: list[tuple[Any, tuple[Any, ...], str]] = [
        (few_24, (x.half(), *w24.tensors, 4, 64, False), "x of torch.float16, scales of torch.float32"),
        (few_24, (x, *w24.tensors, 8, 64, False), "values of torch.uint8"),
        (few_24, (x, *w24.tensors, 3, 64, False), "3 bits"),
        (few_24, (x, *w24.tensors, 4, 48, False), "every 48 columns"),
        (few_24, (x, *w24.tensors, 4, 32, False), r"scales \[8, 3\]"),
        (few_24, (x[:, :128], *w24.tensors, 4, 64, False), r"scales \[8, 3\]"),
        (few_24, (x, scales[:7], values, meta, 4, 64, False), "not one matrix"),
        (few_24, (x, scales, values[:, :-1], meta, 4, 64, False), "not one matrix"),
        (few_24, (x, scales, values, meta[:, :-1], 4, 64, False), "not one matrix"),
        (few_24, (x, scales, values, meta + 1, 4, 64, False), "not two ascending"),
        (few_24, (x, *w24.tensors, 4, 64, False, torch.zeros(7)), r"bias of torch.float32 \[7\]"),
        (few_24, (x, scales, values, meta.int(), 4, 64, False), "int32"),
        (few_24, (torch.tensor(1.0), *w24.tensors, 4, 64, False), "scales"),
        (ops.linear_dense_few, (x, d_scales, d_values[:, :-1], 4, 64, False), "not one matrix"),
        (ops.linear_dense_few, (x, d_scales[0], d_values, 4, 64, False), "not one matrix"),
    ]
    if native.library() is not None:
        bitmask = ops.linear_bitmask_few
        calls += [
            (bitmask, (x, m_scales, m_values, m_mask, starts[1:], 4, 64, False), "not one matrix"),
            (bitmask, (x, m_scales, m_values[:-70], m_mask, starts, 4, 64, False), "go past"),
            (bitmask, (x, m_scales, m_values, m_mask, starts + 1, 4, 64, False), "do not count the bits"),
            (bitmask, (x, m_scales, m_values, m_mask, starts - 1, 4, 64, False), "do not count the bits"),
            (bitmask, (x, m_scales, m_values, m_mask | 1, starts, 4, 64, True), "do not count the bits"),
        ]
    for call, arguments, text in calls:
        with pytest.raises(BackendError, match=text):
            call(*arguments)
