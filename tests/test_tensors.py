"""Tensors as bits."""

from __future__ import annotations

import pytest
import torch

from sparsify.tensors import same_bits, zeroed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("strided", [False, True])
def test_zeroed_is_a_masked_fill(dtype: torch.dtype, strided: bool) -> None:
    torch.manual_seed(0)
    values, mask = torch.randn(6, 10), torch.rand(6, 10) < 0.5
    values[0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    mask[0, :4], mask[1, :2] = True, False
    values = values.to(dtype)
    if strided:
        values, mask = values[:, ::2], mask[:, 1::2]
    found, due = zeroed(values, mask), values.float().masked_fill(mask, 0)
    assert found.dtype == dtype and same_bits(found.float(), due)
    assert not found.float().signbit()[mask].any()
