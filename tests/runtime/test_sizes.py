"""Both sides of every size at which a packed product, or what prepares it, takes another way."""

from __future__ import annotations

import pytest
import torch
from support.matrices import TOLERANCE, error, pruned, pruned_24

from sparsify.errors import Refused
from sparsify.runtime import codes
from sparsify.runtime.codes import row_starts
from sparsify.runtime.cpu import native, products, wide
from sparsify.runtime.layout import choose_layout, pack
from sparsify.runtime.packed_weight import PackedWeight
from sparsify.runtime.words import LAYOUTS, Layout


def check(rows: int, tokens: int, layout: Layout, dtype: torch.dtype = torch.float32) -> None:
    """With a bias of which no two numbers are alike: a panel that takes another's is far off."""
    weight = pruned_24(rows, 64, dtype)
    x, bias = torch.randn(tokens, 64).to(dtype), (torch.arange(rows) / 7).to(dtype)
    packed = PackedWeight.of(weight, layout)
    exact = x.double() @ weight.double().t()
    assert error(packed.operator(x, *packed.tensors.values(), bias), exact + bias.double()) < TOLERANCE[dtype]
    assert error(packed.linear(x), exact) < TOLERANCE[dtype]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [products.MANY, products.MANY + 1])
@pytest.mark.parametrize("rows", [products.PANEL, products.PANEL + 1, 2 * products.PANEL + 3])
def test_panels_of_many_tokens(rows: int, tokens: int, layout: Layout) -> None:
    torch.manual_seed(0)
    check(rows, tokens, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slow", [False, True])
def test_panels_of_any_height(layout: Layout, dtype: torch.dtype, slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch multiplies them, and by way of float32 as where the processor has no instructions for their dtype."""
    torch.manual_seed(0)
    monkeypatch.setattr(products, "MANY", 0)
    monkeypatch.setattr(wide, "slow_dtypes", lambda: {dtype} if slow else frozenset())
    for panel in (1, 3, 7, 8):
        monkeypatch.setattr(products, "PANEL", panel)
        for rows in (1, 7, 8, 20):
            check(rows, 3, layout, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_few_and_more_tokens(layout: Layout) -> None:
    torch.manual_seed(0)
    for few in {products.FEW_24, products.FEW_BITMASK, products.FEW_ACROSS}:
        for tokens in (few - 1, few, few + 1):
            check(9, tokens, layout)


def test_rows_are_counted_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without kernels; by hand: how many are kept in all rows above."""
    mask = pack(pruned(11, 200, 0.4), "bitmask").codes
    exact = [0]
    for row in mask.tolist():
        exact.append(exact[-1] + sum((word & 0xFFFFFFFF).bit_count() for word in row))
    assert row_starts(mask).tolist() == exact
    monkeypatch.setattr(native, "library", lambda: None)
    for words in (1, 3 * mask.shape[1], 11 * mask.shape[1], codes._LOOKED_UP):
        monkeypatch.setattr(codes, "_LOOKED_UP", words)
        assert row_starts(mask).tolist() == exact


@pytest.mark.parametrize("asked", ["auto", *LAYOUTS])
def test_a_matrix_with_nan_stays_dense(asked: Layout) -> None:
    weight = pruned_24(16, 64)
    assert not isinstance(choose_layout(weight, asked), Refused)
    weight[3, 5] = torch.nan
    found = choose_layout(weight, asked)
    assert isinstance(found, Refused) and found.reason == "it holds NaN"


def test_no_more_bytes_than_dense() -> None:
    """A bit for each weight and the kept values: worth it from where they are fewer, to the byte."""
    weight = torch.ones(64, 64)
    for zeros in (190, 191, 192, 193, 194, 300):
        weight.fill_(1).view(-1)[:zeros] = 0
        dense, packed = weight.nbytes, (weight.numel() - zeros + 64) * 4 + weight.numel() // 8
        assert isinstance(choose_layout(weight), Refused) == (packed >= dense), zeros


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slow", [False, True])
def test_dense_weights_of_a_packed_model(dtype: torch.dtype, slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(products, "slow_dtypes", lambda: {dtype} if slow else frozenset())
    x, weight, bias = torch.randn(5, 64).to(dtype), torch.randn(9, 64).to(dtype), torch.randn(9).to(dtype)
    for tokens in (1, 5):
        exact = x[:tokens].double() @ weight.double().t() + bias.double()
        assert error(products.linear_dense(x[:tokens], weight, bias), exact) < TOLERANCE[dtype]
