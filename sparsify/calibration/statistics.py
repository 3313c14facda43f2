"""What is recorded about the input of a linear site, in float32 per batch and float64 across batches.

A pass names the statistics that it wants; the engine feeds each batch's rows and hands the results over. All rows
are [tokens, in_features], padding already taken out. For a stack of experts every statistic is kept per expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class InputStatistics:
    """Statistics of one site's input, as a pass sees them.

    Attributes:
        values: statistic name to tensor; ``squared_norm`` is [in_features] float64, ``‖X_j‖² / sequences``
            (algorithms.md, section 1.3).
        tokens: rows that were seen; 0 for an expert that no token was routed to.
        sequences: calibration sequences.
    """

    values: Mapping[str, Tensor]
    tokens: int
    sequences: int

    @property
    def squared_norm(self) -> Tensor:
        return self.values["squared_norm"]


class Accumulator(Protocol):
    """A statistic under construction for [experts] inputs of one width."""

    def update(self, expert: int, rows: Tensor) -> None: ...

    def value(self, expert: int, sequences: int) -> Tensor: ...


class SquaredNorm:
    """Sum of squares of each input feature."""

    def __init__(self, experts: int, features: int, device: torch.device) -> None:
        # float64 adds nothing to the cost of one vector per batch; the MPS device has none.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sum = torch.zeros(experts, features, dtype=dtype, device=device)

    def update(self, expert: int, rows: Tensor) -> None:
        self._sum[expert] += rows.float().square().sum(dim=0)

    def value(self, expert: int, sequences: int) -> Tensor:
        return self._sum[expert] / sequences


ACCUMULATORS: dict[str, type[SquaredNorm]] = {"squared_norm": SquaredNorm}


class OutputSketch:
    """A few random combinations of all rows, on which output errors are measured.

    Each row is added with a random sign to one of ``size`` rows of the sketch S (CountSketch: Charikar, Chen,
    Farach-Colton 2002), so E ‖S X Dᵀ‖² = ‖X Dᵀ‖² for any D. Every token counts, outliers too; with no more
    than ``size`` rows in all, the sketch is X itself and the error exact. It costs one addition per activation
    where the exact error of a site would cost a second product of its full size.
    """

    def __init__(self, experts: int, features: int, device: torch.device, size: int = 256) -> None:
        self.size = max(size // experts, 32)
        self.rows = torch.zeros(experts, self.size, features, device=device)
        self._next = [0] * experts
        self._filled = [0] * experts
        # A generator of its own: the sketch neither reads nor moves the global random state.
        self._signs = torch.Generator().manual_seed(0)

    def update(self, expert: int, rows: Tensor) -> None:
        rows = rows.float()
        done = 0
        while done < len(rows):
            at = self._next[expert]
            part = rows[done : done + self.size - at]
            signs = torch.randint(0, 2, (len(part), 1), generator=self._signs).mul_(2).sub_(1)
            self.rows[expert, at : at + len(part)].addcmul_(part, signs.to(part))
            done += len(part)
            self._filled[expert] = max(self._filled[expert], at + len(part))
            self._next[expert] = (at + len(part)) % self.size

    def error(self, expert: int, before: Tensor, after: Tensor) -> tuple[float, float]:
        """‖X Wᵀ − X Ŵᵀ‖² and ‖X Wᵀ‖² of one expert, estimated; weights are [out_features, in_features]."""
        rows = self.rows[expert, : self._filled[expert]]
        dense = rows @ before.float().t()
        lost = rows @ (before.float() - after.float()).t()
        return float(lost.square().sum(dtype=torch.float64)), float(dense.square().sum(dtype=torch.float64))


class GroupRecorder:
    """All that is recorded for one input group.

    Args:
        wanted: names of the statistics.
        sketch: whether output errors will be asked for.
    """

    def __init__(
        self, wanted: tuple[str, ...], experts: int, features: int, device: torch.device, *, sketch: bool
    ) -> None:
        self.experts, self.features = experts, features
        self.accumulators = {name: ACCUMULATORS[name](experts, features, device) for name in wanted}
        self.sketch = OutputSketch(experts, features, device) if sketch else None
        self.tokens = [0] * experts

    def update(self, rows: Tensor, ends: Tensor | None = None) -> bool:
        """Record rows [tokens, in_features], for experts sorted with ``ends`` [experts]; False where not finite."""
        bounds = [0, len(rows)] if ends is None else [0, *(int(end) for end in ends)]
        for expert, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
            part = rows[start:stop]
            if not len(part):
                continue
            self.tokens[expert] += len(part)
            for accumulator in self.accumulators.values():
                accumulator.update(expert, part)
            if self.sketch is not None:
                self.sketch.update(expert, part)
        if "squared_norm" in self.accumulators:
            return bool(torch.isfinite(self.accumulators["squared_norm"]._sum).all())
        return bool(torch.isfinite(rows).all())

    def statistics(self, expert: int, sequences: int) -> InputStatistics:
        values = {name: a.value(expert, sequences) for name, a in self.accumulators.items()}
        return InputStatistics(values, self.tokens[expert], sequences)
