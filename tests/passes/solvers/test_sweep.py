"""The sweep against the official loop."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import slow

from sparsify.passes.solvers.gram import upper_root
from sparsify.passes.solvers.sweep import sweep


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(1, 9), st.integers(1, 80))
def test_the_sweep_is_the_column_loop_for_any_width(columns: int, rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(columns * 1000 + rows)
    weight = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(80, columns, generator=generator).double()
    h = inputs.T @ inputs + torch.eye(columns, dtype=torch.float64)
    mask = torch.rand(rows, columns, generator=generator) < 0.5
    root = upper_root(h)
    assert root is not None
    ours, found = sweep(weight, root.float(), mask, width)
    reference, _ = slow.column_by_column(weight, h, h.diagonal() == 0, "50%", slow.obs_scores, mask=mask)
    assert torch.equal(found, mask) and float((ours - reference).norm()) <= 1e-4 * (1 + float(reference.norm()))
