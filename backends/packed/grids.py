"""Weights as integers of few bits: those that lie on a grid, and those that are rounded to one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsify.errors import CalibrationError, Refused
from sparsify.method.grids.finding import OnGrid, found_grid, may_lie, on_grid
from sparsify.method.grids.fitting import nearest
from sparsify.method.pattern import Grid, parse_grid
from sparsify.runtime.few_bits import Integers
from sparsify.runtime.layout import DTYPES
from sparsify.runtime.words import AskedGroup, AskedValues
from sparsify.tensors import all_finite

# In_features of one scale where nobody says: 4 bits over a whole row lose much, 8 bits little.
DEFAULT_GROUPS: dict[str, int | None] = {"int8": None, "int4": 64}
ASYMMETRIC = "on a grid of 8 bits that is not symmetric, which no layout holds: its values keep their dtype"
AGAIN = "on a grid of 8 bits that is not symmetric, which no layout holds: to store integers it was rounded once more"


@dataclass(frozen=True)
class Values:
    """What the options of the backend ask of the values of a weight.

    Attributes:
        meant: whether the model was rounded, so that weights that lie on a grid do so on purpose.
    """

    asked: AskedValues = "auto"
    asked_group: AskedGroup | None = None
    meant: bool = True

    @property
    def rounds(self) -> bool:
        return self.asked in ("int8", "int4")

    @property
    def group(self) -> int | None:
        """In_features that share a scale where weights are rounded; None: all of a row."""
        if self.asked_group is None:
            return DEFAULT_GROUPS.get(self.asked)
        return None if self.asked_group == "row" else int(self.asked_group)

    def held(self, matrix: Tensor) -> Integers | Refused | None:
        """``matrix`` [rows, columns] to the bit as integers; Refused: it lies on a grid, and no layout has it; None: on
        none that was asked for.
        """
        if self.asked == "full" or matrix.dtype not in DTYPES:
            return None
        found = found_grid(matrix)
        if not self.rounds:
            if found is None and off_center(matrix):
                return Refused(ASYMMETRIC)
            if found is not None and not self.meant:
                # Their products round activations, which nobody asked for who only packs.
                bits = 8 if found.grid.bits == 8 else 4
                return Refused(f"on a grid of {bits} bits where no pass put it: values=int{bits} stores it so")
            return None if found is None else _as_integers(found, matrix.dtype)
        grid = parse_grid(self.asked)
        if found is None or found.grid.bits > grid.bits or not self._as_fine(found.group):
            return None
        # A grid of fewer bits is one of more.
        return _as_integers(replace(found, grid=grid), matrix.dtype)

    def _as_fine(self, group: int | None) -> bool:
        """Whether scales for ``group`` are of no smaller groups than were asked for."""
        if self.asked_group is None or group is None:
            return True
        return self.group is not None and group >= self.group

    def rounded(self, matrix: Tensor) -> Tensor | Refused:
        """``matrix`` [rows, columns] at the nearest values of the grid that was asked for, or why it has none."""
        columns = matrix.shape[1]
        try:
            result = nearest(matrix, parse_grid(self.asked), min(self.group or columns, columns)).to(matrix.dtype)
        except CalibrationError as error:
            return Refused(f"{error.asked}: {error.found}")
        if not all_finite(result):
            return Refused(f"rounded to {self.asked} it is past what {matrix.dtype} holds")
        return result


def off_center(matrix: Tensor) -> bool:
    """Whether ``matrix``, which lies on no symmetric grid, seems to lie on one of 8 bits with zero points."""
    # bfloat16 holds none.
    return matrix.dtype != torch.bfloat16 and may_lie(matrix, symmetric=False)


def integers_of(matrix: Tensor, bits: int, group: int | None) -> Integers | None:
    """``matrix`` [rows, columns] to the bit; None where it does not lie on such a grid."""
    found = on_grid(matrix, Grid(bits), None if group is not None and group >= matrix.shape[1] else group)
    return None if found is None else _as_integers(found, matrix.dtype)


def _as_integers(found: OnGrid, dtype: torch.dtype) -> Integers:
    return Integers(found.integers, found.scales.to(dtype), found.grid.bits, found.group)
