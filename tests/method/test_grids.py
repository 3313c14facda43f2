"""Grids of few bits: rounding to them, and finding them in weights of which nothing is known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.matrices import DTYPES, pruned
from torch import Tensor

from sparsify.method.grids import finding, fitting
from sparsify.method.grids.finding import OnGrid, found_grid, may_lie, on_grid
from sparsify.method.grids.fitting import nearest
from sparsify.method.pattern import Grid


def dense(found: OnGrid, dtype: torch.dtype) -> Tensor:
    columns = found.integers.shape[1]
    each = found.scales.float().repeat_interleave(found.group or columns, dim=1)[:, :columns]
    return (each * found.integers).to(dtype)


@given(
    bits=st.sampled_from([8, 4, 3]),
    group=st.sampled_from([None, 32, 64, 128]),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 20),
    columns=st.sampled_from([1, 40, 128, 200]),
    zeros=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=60, deadline=None)
def test_a_grid_is_found_to_the_bit(
    bits: int, group: int | None, dtype: torch.dtype, rows: int, columns: int, zeros: float, seed: int
) -> None:
    weight = pruned(rows, columns, zeros, dtype, seed)
    rounded = nearest(weight, Grid(bits), min(group or columns, columns)).to(dtype)
    assert torch.equal(rounded == 0, rounded.abs() == 0) and not rounded[weight == 0].any()
    found = found_grid(rounded)
    assert found is not None and found.grid.bits <= max(bits, 4)
    assert torch.equal(dense(found, dtype), rounded)
    assert int(found.integers.min()) >= -found.grid.half and int(found.integers.max()) < found.grid.half
    assert found.scales.dtype == torch.float16 and torch.equal(found.scales.to(dtype).half(), found.scales)
    asked = on_grid(rounded, Grid(8 if bits == 8 else 4), None if (group or columns) >= columns else group)
    assert asked is not None and torch.equal(dense(asked, dtype), rounded)


def test_the_smallest_is_found() -> None:
    weight = pruned(64, 512, 0.5)

    def of(bits: int, group: int) -> tuple[int, int | None]:
        found = found_grid(nearest(weight, Grid(bits), group))
        assert found is not None
        return found.grid.bits, found.group

    assert of(8, 512) == (8, None) and of(4, 512) == (4, None) and of(3, 512) == (4, None)
    assert of(4, 64) == (4, 64) and of(4, 32) == (4, 32) and of(8, 128) == (8, 128)
    assert found_grid(torch.zeros(4, 256)) is not None


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_lies_on_none_is_told_by_a_few_numbers(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = pruned(300, 512, 0.5, dtype)
    asked: list[int] = []
    own = finding.integers

    def counted(part: Tensor, *given: object, **options: object) -> object:
        asked.append(part.numel())
        return own(part, *given, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(finding, "integers", counted)
    assert found_grid(weight) is None
    assert sum(asked) <= 9 * 32, "of 300 rows"
    # One row off the grid, and not among those that are tried first.
    rounded = nearest(weight, Grid(4), 64).to(dtype)
    rounded[1] = weight[1]
    assert found_grid(rounded) is None and on_grid(rounded, Grid(4), 64) is None
    for what in (float("nan"), float("inf")):
        rounded[0, 0] = what
        assert found_grid(rounded) is None


def test_a_grid_that_is_not_symmetric() -> None:
    """Of 4 bits it is a symmetric one of 8; of 8 it is none, and can be told."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(-3, 13, (16, 128), generator=generator).float()
    found = found_grid(whole * 0.5)
    assert found is not None and found.grid == Grid(8) and torch.equal(dense(found, torch.float32), whole * 0.5)
    wide = torch.randint(0, 256, (16, 128), generator=generator).float() * 0.5
    wide[:, :2] = torch.tensor([0.0, 127.5])
    assert found_grid(wide) is None and may_lie(wide, symmetric=False)
    assert not may_lie(torch.randn(16, 128, generator=generator), symmetric=False)


def test_by_parts_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = pruned(50, 130, 0.5, torch.bfloat16)
    whole = nearest(weight, Grid(4), 64)
    found = found_grid(whole.bfloat16())
    monkeypatch.setattr(fitting, "_AT_ONCE", 400)
    assert torch.equal(nearest(weight, Grid(4), 64), whole)
    again = found_grid(whole.bfloat16())
    assert found is not None and again is not None
    assert torch.equal(found.integers, again.integers) and torch.equal(found.scales, again.scales)
