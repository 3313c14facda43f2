"""What layers multiply with: joined where packed alike; for a GPU in its layouts, which a reference runs here."""

from __future__ import annotations

import pytest
import torch
from support.gpus import H200
from support.matrices import pruned, pruned_24
from torch import Tensor, nn
from torch.nn.functional import linear

pytest.importorskip("vllm", reason="vLLM is not installed: make vllm")

from sparsify.backends.vllm.products import OnDevice, hold, run
from sparsify.runtime.few_bits import Integers
from sparsify.runtime.layout import Packed, pack, pack_integers, unpack

CPU = torch.device("cpu")


def few(rows: int, columns: int, dtype: torch.dtype) -> Packed:
    whole = (pruned_24(rows, columns).sign() * 3).to(torch.int8)
    return pack_integers(Integers(whole, torch.rand(rows, columns // 64).to(dtype), 4, 64), "packed24")


def parts(dtype: torch.dtype) -> list[Packed | Tensor]:
    """Two of one layout, one of another, one dense, and one of few bits."""
    return [
        pack(pruned_24(32, 128, dtype, 1), "packed24"),
        pack(pruned_24(16, 128, dtype, 2), "packed24"),
        pack(pruned(16, 128, 0.5, dtype, 3), "bitmask"),
        torch.randn(16, 128, generator=torch.Generator().manual_seed(4)).to(dtype),
        few(16, 128, dtype),
    ]


def dense(matrices: list[Packed | Tensor]) -> Tensor:
    return torch.cat([unpack(m) if isinstance(m, Packed) else m for m in matrices])


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("biased", [True, False])
def test_neighbours_of_one_layout_are_one_product(tokens: int, biased: bool) -> None:
    layer, matrices = nn.Module(), parts(torch.float32)
    products = hold(layer, "a layer", matrices, OnDevice(CPU, exact=True))
    assert len(products) == 4
    assert layer.get_parameter("weight").shape == (48, 64)
    x, bias = torch.randn(tokens, 128), torch.randn(96) if biased else None
    assert torch.allclose(run(layer, products, x, bias), linear(x, dense(matrices), bias), atol=1e-4)


def test_one_product_takes_the_bias_itself() -> None:
    layer, matrices = nn.Module(), parts(torch.float32)[:2]
    products = hold(layer, "a layer", matrices, OnDevice(CPU))
    x, bias = torch.randn(3, 128), torch.randn(48)
    assert len(products) == 1
    assert torch.allclose(run(layer, products, x, bias), linear(x, dense(matrices), bias), atol=1e-4)


def test_a_gpu_gets_its_own_layouts_and_the_rest_dense() -> None:
    layer, matrices = nn.Module(), parts(torch.bfloat16)
    products = hold(layer, "a layer", matrices, OnDevice(CPU, tune=False, target=H200))
    # Of few bits, 2:4: of full width. A bitmask: dense, as GPUs multiply no other zeros.
    prepared = torch.ops.sparsify.linear_24_prepared.default
    assert [product.operator for product in products] == [prepared, linear, linear, prepared]
    assert layer.get_parameter("weight_1").shape == (16, 128)
    x = torch.randn(4, 128).bfloat16()
    want = linear(x.float(), dense(matrices).float())
    assert (run(layer, products, x, None).float() - want).norm() / want.norm() < 1e-2


def test_float32_is_dense_on_a_gpu() -> None:
    layer, matrices = nn.Module(), parts(torch.float32)[:1]
    products = hold(layer, "a layer", matrices, OnDevice(CPU, tune=False, target=H200))
    x = torch.randn(4, 128)
    assert products[0].operator is linear and torch.equal(run(layer, products, x, None), linear(x, dense(matrices)))
