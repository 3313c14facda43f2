"""Values on a grid: scales for groups of a row, rounding to them, and the integers back from the values.

A stored value is the dtype's nearest to s·k, with k one of 2^bits neighbouring integers, 0 among them, and s a positive
number that float16 and the dtype both hold. s·k is exact in float32 and is rounded once, by at most one part in 2^p
where the dtype has p significant bits: k is the integer nearest to value / s as long as |k| < 2^(p−1), which all grids
meet but an asymmetric one of 8 bits in bfloat16 (and −128 in bfloat16, which is exact). Scales need not be stored
beside the values: :func:`integers` finds them. The largest value of a group is s·m for some m < 2^bits, which leaves so
many scales to try, the likeliest first; any that gives all values to the bit serves.
"""

from __future__ import annotations

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
_SMALLEST, _LARGEST = 2.0**-24, 65504.0


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
        return whole.mul_(self.scale).to(self.dtype).float()

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
        low = -(-least / full.clamp(min=_SMALLEST)).round().clamp(max=grid.span)
    if float(full.amax()) > _LARGEST:
        raise CalibrationError(
            f"scales for {grid}",
            found=f"one of {float(full.amax()):.3g}, and float16 ends at {_LARGEST:g}",
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


def _error(fitted: Fitted, values: Tensor, weights: Tensor) -> Tensor:
    return (fitted.rounded(values) - values).square_().mul_(weights).sum(-1, keepdim=True)


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale`` as float16 and ``dtype`` both hold it; never zero."""
    return scale.to(dtype).clamp(_SMALLEST, _LARGEST).half().float()


def grouped(values: Tensor, group: int) -> Tensor:
    """[rows, columns] as [rows, groups, group]; the last group is filled up with zeros."""
    return F.pad(values, (0, -values.shape[1] % group)).unflatten(1, (-1, group))


def ungrouped(values: Tensor, columns: int) -> Tensor:
    return values.flatten(1)[:, :columns]


def integers(weight: Tensor, grid: Grid, group: int, *, symmetric: bool) -> tuple[Tensor, Tensor] | None:
    """The scales and integers of which ``weight`` is made to the bit; None where it does not lie on such a grid.

    Args:
        weight: [out_features, in_features]. ``group``: in_features of one scale; the last may have fewer.

    Returns:
        Scales [out_features, groups] float16 and integers [out_features, in_features] int16, with
        ``(scale.float() * integer).to(weight.dtype) == weight``. Symmetric integers, or their negatives (with a
        negative scale), lie in −half … half − 1; others within ``span`` of each other and of 0.
    """
    values = grouped(weight.float(), group).flatten(0, 1)
    largest = values.abs().amax(-1)
    scales, found = torch.ones_like(largest), torch.zeros_like(values)
    left = largest.nonzero().squeeze(1)
    for count in _counts(grid, symmetric):
        for step in (0, -1, 1):
            if not len(left):
                break
            scale = _near(largest[left] / count, step, weight.dtype).unsqueeze(1)
            own = values[left]
            whole = (own / scale).round_()
            spread = whole.amax(-1).clamp(min=0) - whole.amin(-1).clamp(max=0)
            fits = ((whole * scale).to(weight.dtype).float() == own).all(-1) & (spread <= grid.span)
            done = left[fits]
            scales[done], found[done] = scale[fits].squeeze(1), whole[fits]
            left = left[~fits]
    if len(left):
        return None
    rows, columns = weight.shape
    whole = ungrouped(found.view(rows, -1, values.shape[1]), columns)
    return scales.view(rows, -1).half(), whole.to(torch.int16)


def _counts(grid: Grid, symmetric: bool) -> list[int]:
    """What integer the largest value of a group may be, the likeliest first."""
    top = grid.half if symmetric else grid.span
    likely = [grid.half, grid.half - 1]
    return likely + [count for count in range(top, 0, -1) if count not in likely]


def _near(scale: Tensor, step: int, dtype: torch.dtype) -> Tensor:
    """The ``step``-th neighbour of ``scale`` among the numbers that scales may be."""
    held = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    # Neighbouring positive floating-point numbers are neighbouring integers.
    near = (scale.to(held).view(torch.int16) + step).clamp_(min=0).view(held)
    return near.float().clamp(_SMALLEST, _LARGEST).half().float()
