"""Optimal values of the kept weights for a given mask: all columns of a row at once.

For one row with goal g, H the damped Gram matrix and K its kept columns, the minimum of (w − g) H (w − g)ᵀ over rows w
that are zero off K is w_K = (gH)_K (H_KK)⁻¹. This is equation "equivalent form" of algorithms.md, section 8.1 (APT,
"multiple removal problem"), for any goal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Solver = Literal["auto", "cholesky", "cg"]

_CHUNK = 1 << 28  # bytes of H_KK in flight
_FEATURES = 1024  # features whose outer products are in memory at once


def solve_rows(goal: Tensor, gram: Tensor, mask: Tensor) -> Tensor:
    """The exact solution by one Cholesky factorisation per row, in float64; rows in chunks that fit the memory.

    Args:
        goal: [out_features, in_features]. ``gram``: H. ``mask``: True where a weight is pruned.
    """
    goal, gram = goal.double(), gram.double()
    right = goal @ gram
    counts = (~mask).sum(dim=1)
    result = torch.zeros_like(goal)
    order = counts.argsort()
    start = 0
    while start < len(order):
        most = max(1, int(counts[order[min(len(order) - 1, start)]]))
        rows = order[start : start + max(1, _CHUNK // (8 * most * most))]
        size = int(counts[rows].max())
        start += len(rows)
        if not size:
            continue
        # Kept columns first; a row that keeps fewer than the longest is filled up with an identity.
        columns = mask[rows].to(torch.uint8).argsort(dim=1, stable=True)[:, :size]
        valid = torch.arange(size, device=goal.device) < counts[rows].unsqueeze(1)
        block = gram[columns.unsqueeze(2), columns.unsqueeze(1)]
        block.mul_(valid.unsqueeze(2) & valid.unsqueeze(1))
        block.diagonal(dim1=1, dim2=2).add_((~valid).to(block))
        factor = torch.linalg.cholesky(block)
        solved = torch.cholesky_solve((right[rows].gather(1, columns) * valid).unsqueeze(2), factor).squeeze(2)
        result[rows] = result[rows].scatter(1, columns, solved * valid)
    return result


def conjugate_gradients(
    goal: Tensor, gram: Tensor, mask: Tensor, start: Tensor, *, rank: int = 64, tolerance: float = 3e-6, most: int = 60
) -> Tensor:
    """The same minimum for all rows at once, by preconditioned conjugate gradients on the kept weights, in float32.

    A step is one product [out_features, in_features] × [in_features, in_features]. The preconditioner is the exact
    inverse of a diagonal plus ``rank`` leading directions of H, restricted to each row's kept columns (Woodbury): the
    few directions in which inputs vary together are what slows plain conjugate gradients down.

    Args:
        start: where to begin, [out_features, in_features]: a sweep's result is already close.
        tolerance: stop once a step lowers the whole objective by less than this share of it.
    """
    goal, gram = goal.float(), gram.float()
    keep = (~mask).to(goal)
    precondition = _low_rank_inverse(gram, keep, min(rank, max(1, gram.shape[0] // 2)))
    weight = start.float() * keep
    apart = weight - goal
    residual = -(apart @ gram)
    objective = -float((apart * residual).sum(dtype=torch.float64))
    residual *= keep
    ahead = precondition(residual)
    direction = ahead
    size = (residual * ahead).sum(dim=1, keepdim=True)
    for _ in range(most):
        image = (direction @ gram).mul_(keep)
        curvature = (direction * image).sum(dim=1, keepdim=True)
        step = torch.where(curvature > 0, size / curvature, 0)
        weight.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        gained = float((step * size).sum(dtype=torch.float64))
        objective -= gained
        if gained <= tolerance * abs(objective):
            break
        ahead = precondition(residual)
        previous, size = size, (residual * ahead).sum(dim=1, keepdim=True)
        direction = torch.where(previous > 0, size / previous, 0) * direction + ahead
    return weight


def _low_rank_inverse(gram: Tensor, keep: Tensor, rank: int) -> Callable[[Tensor], Tensor]:
    """r ↦ r (Δ + VVᵀ)_KK⁻¹ per row, where H ≈ Δ + VVᵀ with Δ diagonal; ``keep`` is 1 on K."""
    features = gram.shape[0]
    scale = gram.diagonal().sqrt()
    correlation = gram / scale.unsqueeze(1) / scale
    # Subspace iteration: the directions need not be exact to precondition.
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(features, rank + 8, generator=generator).to(gram)
    for _ in range(3):
        basis = torch.linalg.qr(correlation @ basis).Q
    values, turn = torch.linalg.eigh(basis.t() @ correlation @ basis)
    leading = (basis @ turn[:, -rank:]) * values[-rank:].clamp(min=0).sqrt()
    rest = (1 - leading.square().sum(dim=1)).clamp(min=1e-3)
    leading = scale.unsqueeze(1) * leading
    weights = 1 / (scale.square() * rest)
    # S = I + V_Kᵀ Δ_K⁻¹ V_K for every row, by one product with the outer products of V's rows.
    inner = torch.zeros(len(keep), rank * rank, device=gram.device)
    for chunk in range(0, features, _FEATURES):
        part = leading[chunk : chunk + _FEATURES]
        outer = (part.unsqueeze(2) * part.unsqueeze(1)).flatten(1) * weights[chunk : chunk + _FEATURES].unsqueeze(1)
        inner.addmm_(keep[:, chunk : chunk + _FEATURES], outer)
    inner = inner.view(-1, rank, rank)
    inner.diagonal(dim1=1, dim2=2).add_(1)
    factor = torch.linalg.cholesky(inner)

    def precondition(residual: Tensor) -> Tensor:
        scaled = residual * weights
        inside = torch.cholesky_solve((scaled @ leading).unsqueeze(2), factor).squeeze(2)
        return (scaled - inside @ leading.t() * weights).mul_(keep)

    return precondition
