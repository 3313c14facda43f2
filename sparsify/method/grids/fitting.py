"""Scales for groups of a row, and rounding to their grids.

A stored value is the dtype's nearest to s·k, with k one of 2^bits neighbouring integers, 0 among them, and s a positive
number that float16 and the dtype both hold. s·k is exact in float32 and is rounded once, by at most one part in 2^p
where the dtype has p significant bits: k is the integer nearest to value / s as long as |k| < 2^(p−1), which all grids
meet but an asymmetric one of 8 bits in bfloat16 (and −128 in bfloat16, which is exact).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsify.errors import CalibrationError
from sparsify.method.pattern import Grid

Scale = Literal["mse", "minmax"]

# Shares of the range that are tried for scale=mse: what is clipped then is rounded to the ends of the grid.
_SHRINKS = tuple(1 - step / 40 for step in range(21))
SMALLEST, LARGEST = 2.0**-24, 65504.0

# Numbers of a part of a matrix.
_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Fitted:
    """A grid for each group of weights: ``scale`` s and ``low``, the smallest integer, float32 of one shape."""

    grid: Grid
    scale: Tensor
    low: Tensor
    dtype: torch.dtype

    def rounded(self, values: Tensor) -> Tensor:
        """``values``, float32 of a shape that those of ``scale`` broadcast to, each at its nearest of the grid."""
        whole = torch.maximum((values / self.scale).round_(), self.low)
        whole = torch.minimum(whole, self.low + self.grid.span)
        # What rounds to -0.0 is zero as any other.
        return whole.mul_(self.scale).add_(0.0).to(self.dtype).float()

    def of_columns(self) -> Fitted:
        """The same scales, [...] where they are [..., 1]: for one weight of each group at a time."""
        return Fitted(self.grid, self.scale.squeeze(-1), self.low.squeeze(-1), self.dtype)


def unfit_dtype(grid: Grid, dtype: torch.dtype, *, symmetric: bool) -> str | None:
    """Why values of ``dtype`` would not tell the integers of ``grid`` apart, or None where they do."""
    if grid.bits == 8 and not symmetric and dtype == torch.bfloat16:
        return "weights in bfloat16, whose 8 significant bits do not tell 256 integers from a zero point apart"
    return None


def fit(values: Tensor, grid: Grid, dtype: torch.dtype, *, symmetric: bool, scale: Scale, weights: Tensor) -> Fitted:
    """Scales for groups of weights, [..., 1] each.

    Args:
        values: [..., group] float32, one group to a row; zeros may be among them.
        weights: what a squared error counts, broadcast to ``values``; for ``scale=mse``.

    Raises:
        CalibrationError: values for which float16 has no scale.
    """
    # Zero is on every grid: pruned weights are there.
    least, most = values.amin(-1, keepdim=True).clamp(max=0), values.amax(-1, keepdim=True).clamp(min=0)
    if symmetric:
        # One integer more on the side of the larger: −half … half − 1, or with a negative scale the other way.
        low = torch.where(-least > most, -grid.half, 1 - grid.half).float()
        full = torch.maximum(least / low, most / (low + grid.span))
    else:
        full = (most - least) / grid.span
        low = -(-least / full.clamp(min=SMALLEST)).round().clamp(max=grid.span)
    if float(full.amax()) > LARGEST:
        raise CalibrationError(
            f"scales for {grid}",
            found=f"one of {float(full.amax()):.3g}, and float16 ends at {LARGEST:g}",
            do="Leave this weight out with --ignore: no sound model has such values",
        )
    best = Fitted(grid, _stored(full, dtype), low, dtype)
    if scale == "minmax":
        return best
    error = _error(best, values, weights)
    for shrink in _SHRINKS[1:]:
        tried = Fitted(grid, _stored(full * shrink, dtype), low, dtype)
        found = _error(tried, values, weights)
        better = found < error
        error = torch.where(better, found, error)
        best = Fitted(grid, torch.where(better, tried.scale, best.scale), low, dtype)
    return best


def nearest(weight: Tensor, grid: Grid, group: int, *, symmetric: bool = True, scale: Scale = "mse") -> Tensor:
    """``weight`` [out_features, in_features], each value at its nearest of its group's grid: float32.

    Raises:
        CalibrationError: as :func:`fit`.
    """
    one = torch.ones(1, device=weight.device)
    out = weight.new_empty(weight.shape, dtype=torch.float32)
    for rows in parts_of(weight):
        parts = grouped(weight[rows].float(), group)
        fitted = fit(parts, grid, weight.dtype, symmetric=symmetric, scale=scale, weights=one)
        out[rows] = ungrouped(fitted.rounded(parts), weight.shape[1])
    return out


def _error(fitted: Fitted, values: Tensor, weights: Tensor) -> Tensor:
    return (fitted.rounded(values) - values).square_().mul_(weights).sum(-1, keepdim=True)


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale`` as float16 and ``dtype`` both hold it; never zero."""
    return scale.to(dtype).clamp(SMALLEST, LARGEST).half().float()


def grouped(values: Tensor, group: int) -> Tensor:
    """[rows, columns] as [rows, groups, group]; the last group is filled up with zeros."""
    return F.pad(values, (0, -values.shape[1] % group)).unflatten(1, (-1, group))


def ungrouped(values: Tensor, columns: int) -> Tensor:
    return values.flatten(1)[:, :columns]


def parts_of(weight: Tensor) -> Iterator[slice]:
    """Rows of ``weight``, so many at a time that copies of them are small."""
    step = max(1, _AT_ONCE // max(1, weight.shape[1]))
    yield from (slice(first, first + step) for first in range(0, weight.shape[0], step))
