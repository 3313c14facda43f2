"""The scan against torch's own isfinite: every dtype, piece by piece, masks."""

from __future__ import annotations

import random

import pytest
import torch

from sparsify.finite import Scan, scan
from sparsify.tensors import as_bytes

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
]  # fmt: skip


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize == 1 else dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_pattern_is_judged_as_torch_does(dtype: torch.dtype) -> None:
    if dtype.itemsize == 1:
        values = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)
    else:
        whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        bits = torch.randint(0, 256, (1 << 16, dtype.itemsize), generator=torch.Generator().manual_seed(0))
        bits[: 1 << 13, -1] = random.Random(0).choice([0x7F, 0xFF])
        values = bits.to(torch.uint8).flatten().view(whole).view(dtype)
    bad = ~values.to(wide(dtype)).isfinite()
    found = scan(values)
    assert found.count == int(bad.sum()) and found.count
    assert found.first == int(bad.to(torch.uint8).argmax())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fnuz], ids=str)
def test_pieces_of_any_size_give_the_same(dtype: torch.dtype) -> None:
    values = torch.randn(999).to(dtype)
    values[[7, 500]] = torch.inf
    found, data, at, sizes = Scan(dtype), bytes(as_bytes(values)), 0, random.Random(1)
    while at < len(data):
        step = sizes.randrange(1, 60)
        found.update(memoryview(data)[at : at + step])
        at += step
    assert (found.count, found.first) == (2, 7)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, (1 << 19) - 1, 1 << 19, (1 << 20) + 5])
def test_both_sides_of_every_piece(at: int, value: float) -> None:
    values = torch.zeros((1 << 20) + 6, dtype=torch.bfloat16)
    values[at] = value
    assert (scan(values).count, scan(values).first) == (1, at)
    assert scan(values, mask=True).count == (value != -torch.inf)


def test_what_is_finite_passes() -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        info = torch.finfo(dtype)
        assert not scan(torch.tensor([0.0, -0.0, info.max, info.min, info.tiny, -info.tiny / 2], dtype=dtype)).count
    assert not scan(torch.empty(0)).count and not scan(torch.full((3,), -1)).count
    assert scan(torch.tensor([1 + 0j, complex(0, torch.nan)])).first == 1
    assert scan(torch.zeros(4, 4).t()[1:]).count == 0 and scan(torch.tensor(torch.nan)).first == 0


def test_two_numbers_in_a_byte_are_never_nan() -> None:
    assert not scan(torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float4_e2m1fn_x2)).count
