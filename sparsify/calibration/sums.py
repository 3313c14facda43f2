"""What is known of the gradients of a weight: sums over samples under construction, and the finished ones.

Sums are float32, and in which order they are taken decides their last bits. So of several processes each goes on with
what the one before it made of the samples before its own: the first differentiates the last region and hands its sums
on, and while the second goes on with them, the first is at the region before. The result is that of one process, to the
bit, and no gradient of a single sample is kept or sent.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from sparsify.analysis.linear import LinearSite
from sparsify.calibration.activations import ActivationStore
from sparsify.errors import CalibrationError
from sparsify.tensors import all_finite
from sparsify.world.world import World


class Gradients(ActivationStore):
    """Finished gradient statistics by parameter. A context manager; past its budget they lie in a file.

    Attributes:
        names: of each parameter, which statistics there are.
    """

    def __init__(self, budget: int) -> None:
        super().__init__(budget)
        self.names: dict[str, tuple[str, ...]] = {}

    def keep(self, parameter: str, values: dict[str, Tensor]) -> None:
        self.names[parameter] = tuple(values)
        for name, value in values.items():
            self.put(0, f"{parameter} {name}", value)

    def read(self, site: LinearSite, device: torch.device | None = None) -> dict[str, Tensor]:
        """Statistic name to [experts, out_features, in_features] float32 on ``device``, or the CPU; empty where none
        was measured."""
        found = self.of(site.parameter, device or torch.device("cpu"))
        return {name: site.matrices(value) for name, value in found.items()}

    def of(self, parameter: str, device: torch.device) -> dict[str, Tensor]:
        """Statistic name to its value in the parameter's own shape."""
        found: dict[str, Tensor] = {}
        for name in self.names.get(parameter, ()):
            value = self.take(0, f"{parameter} {name}", device, keep=True)
            assert isinstance(value, Tensor)
            found[name] = value
        return found


class Sums:
    """The statistics of one parameter over the samples seen so far."""

    def __init__(self, wanted: Collection[str]) -> None:
        self.values: dict[str, Tensor] = {}
        self.wanted = set(wanted)
        self._smooth: tuple[Tensor, Tensor] | None = None

    def add(self, gradient: Tensor) -> None:
        made = {"gradient_l1": gradient.abs, "gradient_l2": gradient.square, "gradient": gradient.clone}
        for name in self.wanted & made.keys():
            if name in self.values:
                self.values[name] += made[name]()
            else:
                self.values[name] = made[name]()
        if "gradient_platon" in self.wanted:
            # Sensitivity and uncertainty without |w|, which is constant here (PLATON, equations 6 to 8).
            size = gradient.abs()
            mean, deviation = self._smooth or (torch.zeros_like(size), torch.zeros_like(size))
            mean = 0.85 * mean + 0.15 * size
            deviation = 0.95 * deviation + 0.05 * (size - mean).abs()
            self._smooth = mean, deviation
            self.values["gradient_platon"] = mean * deviation

    @property
    def state(self) -> list[Tensor]:
        """All that :meth:`go_on` takes, in its order; nothing where no sample has been added."""
        kept = [self.values[name] for name in sorted(self.values) if name != "gradient_platon"]
        return [*kept, *(self._smooth or ())]

    def go_on(self, state: Sequence[Tensor]) -> None:
        """Be what gave ``state``."""
        names = sorted(self.wanted - {"gradient_platon"})
        self.values = dict(zip(names, state, strict=False))
        if "gradient_platon" in self.wanted:
            mean, deviation = state[len(names) :]
            self._smooth, self.values["gradient_platon"] = (mean, deviation), mean * deviation

    def finished(self, parameter: str) -> dict[str, Tensor]:
        if not self.values or not any(bool(v.any()) for v in self.values.values()):
            raise CalibrationError(
                f"gradients of {parameter}",
                found="zero on every calibration sample",
                do="Leave it out with --ignore, or use a pass without gradients",
            )
        if "gradient_l2" in self.values:
            self.values["gradient_l2"].sqrt_()
        if not all(all_finite(v) for v in self.values.values()):
            raise CalibrationError(
                f"gradients of {parameter}",
                found="NaN or infinity",
                do="Look at the weights and the labels; where float16 overflows take --compute-dtype float32",
            )
        return self.values


class Relay:
    """Sums on their way from process to process, each of which adds its samples to those of all before it.

    Args:
        shape: of a parameter. wanted: names of the statistics.
    """

    def __init__(
        self, world: World, device: torch.device, shape: Callable[[str], Sequence[int]], wanted: Collection[str]
    ) -> None:
        self.world, self.device, self.shape, self.wanted = world, device, shape, set(wanted)
        # What the last process is going to give to the first, in that order: of weights that more regions read.
        self._coming: list[list[str]] = []
        world.line_up()

    def take(self, sums: dict[str, Sums], own: Collection[str]) -> None:
        """Before a region that reads the parameters ``own``: what earlier samples gave, into ``sums``."""
        if not self.world.divided:
            return
        if self.world.rank:
            self._take(sums, sorted(own))
            return
        while any(not set(own).isdisjoint(names) for names in self._coming):
            self._take(sums, self._coming.pop(0))

    def hand_on(self, sums: dict[str, Sums], own: Collection[str], later: Collection[str]) -> None:
        """After it: what this process's samples have made of them, to whoever goes on. What is left in ``sums`` of
        ``own`` is finished, but for what ``later`` regions read.
        """
        if not self.world.divided:
            return
        again, last = sorted(set(own) & set(later)), self.world.rank + 1 == self.world.size
        if not self.world.rank and again:
            self._coming.append(again)
        if last:
            self._give(sums, again)
        else:
            # No more than one region's sums wait for others.
            self.world.all_taken()
            self._give(sums, sorted(own))

    def tell(self, finished: Gradients) -> None:
        """What the last process has ``finished``, to all."""
        if not self.world.divided:
            return
        self.world.all_taken()
        last = self.world.size - 1
        known: Mapping[str, Sequence[str]] = self.world.told({n: list(of) for n, of in finished.names.items()})[last]
        for parameter, names in known.items():
            found = finished.of(parameter, self.device)
            values = {n: self.world.given(found.get(n, self._empty(parameter)), last) for n in names}
            if not found:
                finished.keep(parameter, values)

    def _take(self, sums: dict[str, Sums], names: Sequence[str]) -> None:
        counts = self.world.take(torch.zeros(len(names), dtype=torch.int64)).tolist()
        for name, count in zip(names, counts, strict=True):
            state = [self.world.take(self._empty(name)) for _ in range(count)]
            sums[name] = Sums(self.wanted)
            if state:
                sums[name].go_on(state)

    def _give(self, sums: dict[str, Sums], names: Sequence[str]) -> None:
        states = [sums.pop(name).state for name in names]
        self.world.hand_on(torch.tensor([len(state) for state in states], dtype=torch.int64))
        for value in (value for state in states for value in state):
            self.world.hand_on(value)

    def _empty(self, parameter: str) -> Tensor:
        return torch.empty(tuple(self.shape(parameter)), dtype=torch.float32, device=self.device)
