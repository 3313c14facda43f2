"""Both exact solvers against the normal equations of each row."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import slow

from sparsify.passes.solvers.exact import conjugate_gradients, solve_rows


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 10**6))
def test_solvers_agree_on_any_mask(columns: int, rows: int, seed: int) -> None:
    """Rows that keep nothing, everything, or different numbers of weights."""
    generator = torch.Generator().manual_seed(seed)
    goal = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(2 * columns, columns, generator=generator).double()
    h = inputs.T @ inputs + torch.eye(columns, dtype=torch.float64)
    mask = torch.rand(rows, columns, generator=generator) < torch.rand(rows, 1, generator=generator) * 1.5 - 0.2
    reference = slow.row_by_row(goal, h, mask)
    scale = 1e-12 + float(reference.norm())
    assert float((solve_rows(goal, h, mask) - reference).norm()) <= 1e-9 * scale
    start = goal.masked_fill(mask, 0)
    cg = conjugate_gradients(goal, h.float(), mask, start, rank=4)
    assert slow.objective(cg, goal, h) <= 1.001 * slow.objective(reference, goal, h) + 1e-6 * scale
