"""packed24 and more tokens than are multiplied one by one: with AVX-512 they lie across the vectors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.few_bits import few
from support.matrices import DTYPES, TOLERANCE, error, pruned_24

from sparsify.runtime import ops
from sparsify.runtime.cpu import native, products
from sparsify.runtime.few_arguments import GROUPS
from sparsify.runtime.packed_weight import PackedWeight

# Both sides of each number of vectors, and of what is taken at a time.
TOKENS = (3, 8, 9, 14, 15, 16, 17, 32, 33, 48, 49, 64, 65, 81, 130)
# Both sides of the rows and of the columns that are taken at a time, for any number of vectors.
ROWS = st.one_of(st.integers(1, 40), st.sampled_from((127, 128, 129, 257, 300)))
COLUMNS = st.one_of(st.integers(1, 300), st.sampled_from((512, 513, 576, 1100)))
# Between the numbers next to zero: half precision reaches that with products of ordinary size.
HALF_STEP = {dtype: torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2 for dtype in DTYPES}


@settings(max_examples=60, deadline=None)
@given(ROWS, COLUMNS, st.sampled_from(TOKENS), st.sampled_from(DTYPES), st.booleans(), st.integers(0, 99))
def test_as_near_as_few_tokens(
    rows: int, columns: int, tokens: int, dtype: torch.dtype, biased: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = pruned_24(rows, columns, dtype, seed)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype) if biased else None
    packed = PackedWeight.of(weight, "packed24")
    got = packed.operator(x, *packed.tensors.values(), bias).double()
    exact, scale = x.double() @ weight.double().t(), x.double().abs() @ weight.double().abs().t()
    if bias is not None:
        exact, scale = exact + bias.double(), scale + bias.double().abs()
    assert got.shape == exact.shape
    assert bool(((got - exact).abs() <= TOLERANCE[dtype] * scale + HALF_STEP[dtype]).all())


@settings(max_examples=60, deadline=None)
@given(
    ROWS,
    COLUMNS,
    st.sampled_from((17, 32, 33, 64, 65, 81)),
    st.sampled_from((8, 4)),
    st.sampled_from(GROUPS),
    st.sampled_from(DTYPES),
    st.booleans(),
)
def test_few_bits_are_the_weights_that_they_stand_for(
    rows: int, columns: int, tokens: int, bits: int, group: int, dtype: torch.dtype, exact: bool
) -> None:
    w = few("packed24", rows, columns, bits, group, dtype)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    truth, scale = x.double() @ w.dense.double().t(), x.double().abs() @ w.dense.double().abs().t()
    got = w.linear(x, exact).double()
    assert bool(((got - truth).abs() <= TOLERANCE[dtype] * scale + HALF_STEP[dtype]).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_is_the_same_whatever_is_beside_it(dtype: torch.dtype) -> None:
    """Sums go from column to column, those of few tokens in a vector of each, of many in a lane of each: no bit changes
    while they stay few or many, with any number of threads."""
    if not native.any_number_24(dtype):
        pytest.skip("products of many tokens are torch's on this machine")
    packed = PackedWeight.of(pruned_24(200, 1100, dtype), "packed24")
    x = torch.randn(130, 1100).to(dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for part, counts in ((x, [17, 31, 32, 47, 64, 65, 129]), (x[: products.few_24()], range(2, products.few_24()))):
            whole = packed.linear(part)
            for threads in (1, 2):
                torch.set_num_threads(threads)
                for tokens in counts:
                    assert torch.equal(packed.linear(part[:tokens]), whole[:tokens])
                    assert torch.equal(packed.linear(part[-tokens:]), whole[-tokens:])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("tokens", [12, 20, 70])
def test_an_infinity_meets_the_zeros_too(tokens: int, value: float, dtype: torch.dtype) -> None:
    weight = pruned_24(40, 200, dtype)
    x = torch.randn(tokens, 200).to(dtype)
    x[tokens - 1, 77] = value
    got = PackedWeight.of(weight, "packed24").linear(x).double()
    exact = x.double() @ weight.double().t()
    assert torch.equal(got.isfinite(), exact.isfinite()) and torch.equal(got.isnan(), exact.isnan())
    assert error(got[:-1], exact[:-1]) < TOLERANCE[dtype]


def test_memory_that_is_not_aligned() -> None:
    """Tensors over the bytes of a file may begin anywhere."""
    weight = pruned_24(33, 192, torch.bfloat16)
    packed = PackedWeight.of(weight, "packed24").packed
    buffer = torch.zeros(packed.values.numel() + 1, dtype=torch.bfloat16)
    buffer[1:] = packed.values.flatten()
    codes = torch.zeros(packed.codes.numel() + 3, dtype=torch.uint8)
    codes[3:] = packed.codes.flatten()
    x = torch.randn(40 * 192 + 1).bfloat16()[1:].view(40, 192)
    got = ops.linear_24(x, buffer[1:].view_as(packed.values), codes[3:].view_as(packed.codes), None)
    assert torch.equal(got, ops.linear_24(x.clone(), packed.values, packed.codes, None))
    assert error(got, x.double() @ weight.double().t()) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("isa", native.ISAS)
def test_every_instruction_set_takes_any_number_of_tokens(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = native.library()
    if kernels is None or native.ISAS.index(isa) > kernels.best_isa:
        pytest.skip(f"this machine has no {isa}")
    monkeypatch.setenv("SPARSIFY_CPU_ISA", isa)
    native.isa.cache_clear()
    try:
        weight = pruned_24(50, 130)
        packed = PackedWeight.of(weight, "packed24")
        for tokens in (1, products.FEW_ACROSS, products.FEW_ACROSS + 1, 17, 65):
            x = torch.randn(tokens, 130)
            assert error(packed.linear(x), x.double() @ weight.double().t()) < TOLERANCE[torch.float32]
    finally:
        native.isa.cache_clear()
