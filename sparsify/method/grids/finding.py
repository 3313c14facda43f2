"""The integers and scales of which a weight is made to the bit, found from its values.

Scales need not be stored beside them. The largest value of a group is s·m for some m < 2^bits, which leaves so many
scales to try, the likeliest first; any that gives all values to the bit serves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.method.grids.fitting import LARGEST, SMALLEST, grouped, parts_of, ungrouped
from sparsify.method.pattern import Grid

# What is looked for where nothing is known of a weight, smallest first; None: one scale for a row.
GROUPS = (None, 128, 64, 32)
_GRIDS = (Grid(4), Grid(8))
# Rows that are tried before all are.
_TRIED = 8
# Numbers that guesses are tried on at once, where that many are not a single guess's.
_AT_ONCE = 1 << 15


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
    guesses = torch.tensor([(count, step) for count in _counts(grid, symmetric) for step in (0, -1, 1)])
    while len(guesses) and len(left):
        # Of a few rows many guesses at once: most of a small step's time is that it is one.
        own = values[left].unsqueeze(1)
        some, guesses = guesses.split([n := min(len(guesses), max(1, _AT_ONCE // own.numel())), len(guesses) - n])
        scale = _near(largest[left].unsqueeze(1) / some[:, 0], some[:, 1], weight.dtype).unsqueeze(2)
        whole = (own / scale).round_()
        spread = whole.amax(-1).clamp(min=0) - whole.amin(-1).clamp(max=0)
        fits = ((whole * scale).to(weight.dtype).float() == own).all(-1) & (spread <= grid.span)
        fit, first = fits.any(-1), fits.int().argmax(-1)
        done, best = left[fit], first[fit]
        scales[done], found[done] = scale[fit, best].squeeze(1), whole[fit, best]
        left = left[~fit]
    if len(left):
        return None
    rows, columns = weight.shape
    whole = ungrouped(found.view(rows, -1, values.shape[1]), columns)
    return scales.view(rows, -1).half(), whole.to(torch.int16)


@dataclass(frozen=True)
class OnGrid:
    """A matrix to the bit: ``(scales.float() * integers).to(dtype)``, each scale for ``group`` columns (None: all).

    ``scales`` float16 [rows, groups], negative where a group's integers reach ``half``; ``integers`` int8 [rows,
    columns], -half … half - 1.
    """

    grid: Grid
    group: int | None
    scales: Tensor
    integers: Tensor


def found_grid(weight: Tensor) -> OnGrid | None:
    """The symmetric grid of the fewest bits on which ``weight`` [out_features, in_features] lies; None where it lies on
    none of 4 or 8 bits.

    Cheap where it does not: what lies on any of them does so with the first columns of a few rows. An asymmetric grid
    of 4 or 3 bits is a symmetric one of 8 or 4.
    """
    if not may_lie(weight, symmetric=True):
        return None
    for grid in _GRIDS:
        for group in GROUPS:
            if (group or 0) < weight.shape[1] and (found := on_grid(weight, grid, group)) is not None:
                return found
    return None


def may_lie(weight: Tensor, *, symmetric: bool) -> bool:
    """Whether a few numbers of ``weight`` lie on a grid of 8 bits."""
    some = weight[:: max(1, weight.shape[0] // _TRIED), : min(group for group in GROUPS if group is not None)]
    return integers(some, Grid(8), some.shape[1], symmetric=symmetric) is not None


def on_grid(weight: Tensor, grid: Grid, group: int | None) -> OnGrid | None:
    """``weight`` [out_features, in_features] on the symmetric ``grid`` with scales for ``group`` columns; None where it
    does not lie there.
    """
    width = weight.shape[1] if group is None else group
    scales, whole = [], []
    if integers(weight[:: max(1, weight.shape[0] // _TRIED)], grid, width, symmetric=True) is None:
        return None
    for rows in parts_of(weight):
        found = integers(weight[rows], grid, width, symmetric=True)
        if found is None:
            return None
        parts = grouped(found[1], width)
        # half itself is an integer of the group's only the other way round.
        sign = torch.where(parts.amax(-1) == grid.half, -1, 1)
        scales.append(found[0] * sign)
        whole.append(ungrouped(parts * sign.unsqueeze(-1), weight.shape[1]).to(torch.int8))
    return OnGrid(grid, group, torch.cat(scales), torch.cat(whole))


def _counts(grid: Grid, symmetric: bool) -> list[int]:
    """What integer the largest value of a group may be, the likeliest first."""
    top = grid.half if symmetric else grid.span
    likely = [grid.half, grid.half - 1]
    return likely + [count for count in range(top, 0, -1) if count not in likely]


def _near(scale: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
    """The ``step``-th neighbour of ``scale`` among the numbers that scales may be."""
    held = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    # Neighbouring positive floating-point numbers are neighbouring integers.
    near = (scale.to(held).view(torch.int16) + step.to(torch.int16)).clamp_(min=0).view(held)
    return near.float().clamp(SMALLEST, LARGEST).half().float()
