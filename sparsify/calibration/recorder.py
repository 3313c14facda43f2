"""What one input group records while its batches run: the statistics that a pass wants, and a sketch for errors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sparsify.calibration.accumulators import ACCUMULATORS, OUTPUTS
from sparsify.errors import CalibrationError
from sparsify.method.statistics import InputStatistics
from sparsify.tensors import all_finite
from sparsify.world.world import ALONE, World


class OutputSketch:
    """A few random combinations of all rows, on which output errors are measured.

    Each row is added with a random sign to one of ``size`` rows of the sketch S (CountSketch: Charikar, Chen,
    Farach-Colton 2002), so E ‖S X Dᵀ‖² = ‖X Dᵀ‖² for any D. Every token counts, outliers too; with no more
    than ``size`` rows in all, the sketch is X itself and the error exact. It costs one addition per activation
    where the exact error of a site would cost a second product of its full size.

    Args:
        twin: keep the same combinations of the dense model's rows too; errors are then against its outputs.
    """

    SIZE, LEAST = 256, 32

    def __init__(
        self, experts: int, features: int, device: torch.device, size: int = SIZE, *, twin: bool = False
    ) -> None:
        self.size = max(size // experts, self.LEAST)
        self.rows = torch.zeros(experts, self.size, features, dtype=torch.float32, device=device)
        self.dense = torch.zeros_like(self.rows) if twin else self.rows
        self._next = [0] * experts
        self._filled = [0] * experts
        # A generator of its own: the sketch neither reads nor moves the global random state.
        self._signs = torch.Generator().manual_seed(0)

    def update(self, expert: int, rows: Tensor, dense: Tensor) -> None:
        # All signs at once: on a GPU a batch costs one copy, not one for each turn of the sketch.
        signs = torch.randint(0, 2, (len(rows), 1), generator=self._signs).mul_(2).sub_(1)
        signs = signs.to(rows.device, torch.float32, non_blocking=True)
        done = 0
        while done < len(rows):
            at = self._next[expert]
            part, sign = rows[done : done + self.size - at], signs[done : done + self.size - at]
            self.rows[expert, at : at + len(part)].addcmul_(part.float(), sign)
            if self.dense is not self.rows:
                self.dense[expert, at : at + len(part)].addcmul_(dense[done : done + len(part)].float(), sign)
            done += len(part)
            self._filled[expert] = max(self._filled[expert], at + len(part))
            self._next[expert] = (at + len(part)) % self.size

    def error(self, expert: int, before: Tensor, after: Tensor) -> tuple[float, float]:
        """‖X₀ Wᵀ − X Ŵᵀ‖² and ‖X₀ Wᵀ‖² of one expert, estimated; weights are [out_features, in_features].

        X₀ is X unless the sketch has a twin.
        """
        filled = self._filled[expert]
        rows, original = self.rows[expert, :filled], self.dense[expert, :filled]
        dense = original @ before.float().t()
        # One stream: the product of the difference rather than the difference of products, which would cancel.
        one = self.dense is self.rows
        lost = rows @ (before.float() - after.float()).t() if one else dense - rows @ after.float().t()
        return _squares(lost), _squares(dense)

    def relative_error(
        self, before: Iterable[Tensor], after: Iterable[Tensor], name: str = "a site", world: World = ALONE
    ) -> float | None:
        """‖X₀ Wᵀ − X Ŵᵀ‖ / ‖X₀ Wᵀ‖ over all experts; None where every output is zero. Of several processes each has a
        sketch of its own rows, and squares add.

        Raises:
            CalibrationError: outputs of the site ``name`` that are no numbers.
        """
        lost = whole = 0.0
        for expert, (one, other) in enumerate(zip(before, after, strict=True)):
            part, of = self.error(expert, one, other)
            lost, whole = lost + part, whole + of
        if world.divided:
            lost, whole = world.summed(torch.tensor([lost, whole], dtype=torch.float64)).tolist()
        error = (lost / whole) ** 0.5 if whole > 0 else None
        if error is not None and not math.isfinite(error):
            raise CalibrationError(
                f"the output of {name}", found="past what float32 holds", do="Look at the weights before this site"
            )
        return error


class OutputMoments:
    """Moments of one site's outputs over the calibration tokens: the statistics of ``OUTPUTS``.

    Args:
        weight: [experts, out_features, in_features], as it is before it is pruned. ``biases``: [experts, out_features].
    """

    def __init__(self, wanted: Sequence[str], weight: Tensor, biases: Tensor | None) -> None:
        self.weight, self.biases, self.wanted = weight.float(), biases, [name for name in wanted if name in OUTPUTS]
        self.sums: dict[tuple[int, str], Tensor] = {}

    def update(self, expert: int, rows: Tensor) -> None:
        outputs = rows.float() @ self.weight[expert].t()
        if self.biases is not None:
            outputs += self.biases[expert].float()
        for name in self.wanted:
            added = OUTPUTS[name](outputs).double()
            self.sums[expert, name] = self.sums.get((expert, name), 0) + added

    def join(self, world: World) -> None:
        """Bring together what all processes saw."""
        keys = {(int(e), str(name)) for keys in world.told(sorted(self.sums)) for e, name in keys}
        size = self.weight.shape[1]
        for expert, name in sorted(keys):
            shape = (size, size) if name == "output_gram" else (size,)
            none = torch.zeros(shape, dtype=torch.float64, device=self.weight.device)
            self.sums[expert, name] = world.summed(self.sums.get((expert, name), none))

    def values(self, expert: int) -> dict[str, Tensor]:
        return {name: self.sums[expert, name] for name in self.wanted if (expert, name) in self.sums}


class GroupRecorder:
    """All that is recorded for one input group.

    Args:
        wanted: names of the statistics.
        twin: whether rows of the dense model come beside those of the pruned one.

    Attributes:
        outputs: by parameter, what is recorded of the outputs of a site that reads this input; often nothing.
    """

    def __init__(
        self,
        wanted: Sequence[str],
        experts: int,
        features: int,
        device: torch.device,
        *,
        twin: bool = False,
        world: World = ALONE,
    ) -> None:
        self.experts, self.features, self.world = experts, features, world
        self.outputs: dict[str, OutputMoments] = {}
        names = [name for name in wanted if name in ACCUMULATORS]
        self.accumulators = {name: ACCUMULATORS[name](experts, features, device, world) for name in names}
        # Squares of all processes add: with an equal part of the rows each they tell as much as one process's sketch.
        size = -(-OutputSketch.SIZE // world.size)
        self.sketch = OutputSketch(experts, features, device, size, twin=twin or "cross_gram" in names)
        self.tokens = [0] * experts
        self._shared: InputStatistics | None = None

    def update(self, rows: Tensor, ends: Tensor | None = None, dense: Tensor | None = None) -> Tensor:
        """Record one batch; whether it is finite, as a tensor where the rows lie, so that nobody need wait for it now.

        Args:
            rows: [tokens, in_features], for experts sorted by expert with ``ends`` [experts] on the CPU.
            dense: the same rows in the dense model, where there are two; else the rows themselves.
        """
        dense = rows if dense is None else dense
        bounds = [0, len(rows)] if ends is None else [0, *ends.tolist()]
        for expert, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
            part, other = rows[start:stop], dense[start:stop]
            if not len(part):
                continue
            self.tokens[expert] += len(part)
            for accumulator in self.accumulators.values():
                accumulator.update(expert, part, other)
            for moments in self.outputs.values():
                moments.update(expert, part)
            self.sketch.update(expert, part, other)
        finite = _finite(rows)
        return finite if dense is rows else finite & _finite(dense)

    def join(self) -> None:
        """Bring together what all processes saw of this input: once, when every one has seen its share."""
        if not self.world.divided:
            return
        counts = self.world.told(self.tokens)
        self.tokens = [sum(of) for of in zip(*counts, strict=True)]
        for accumulator in self.accumulators.values():
            accumulator.join()
        for _, moments in sorted(self.outputs.items()):
            moments.join(self.world)

    def statistics(self, expert: int, sequences: int) -> InputStatistics:
        """What was recorded for ``expert``. Sites that read one input share the object, and what is derived from it."""
        if self._shared is not None:
            return self._shared
        values = {name: a.value(expert, sequences) for name, a in self.accumulators.items()}
        made = InputStatistics(values, self.tokens[expert], sequences)
        if self.experts == 1:
            self._shared = made
            self.accumulators.clear()
        return made


def _squares(values: Tensor) -> float:
    total = float(values.square().sum(dtype=torch.float64))
    # Squares of numbers past 1e19 are too large for float32.
    return total if math.isfinite(total) else float(values.double().square().sum())


def _finite(values: Tensor) -> Tensor:
    """Whether all of ``values`` are finite, where they lie."""
    return torch.tensor(all_finite(values)) if values.is_cpu else values.isfinite().all()
