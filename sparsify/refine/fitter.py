"""One region on one batch, as often as it is asked: with the weights that are trained, and with a graph of derivatives.

Memory holds the region's weights, their float32 copies, gradients and moments, and the activations of one batch;
nothing of other regions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sparsify.calibration.interpreter import Interpreter, Region, Work
from sparsify.errors import CalibrationError
from sparsify.method.region_pass import RegionPass
from sparsify.refine.masters import Masters
from sparsify.tensors import all_finite
from sparsify.world.world import ALONE, World

# The loss of a batch from the value that the region gives for it.
Judge = Callable[[int, Tensor], Tensor]
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Lessons:
    """What a region learns from: the numbers of the lessons to train on, and of those to judge by.

    Attributes:
        size: batches of one lesson, which are trained on together: several where processes share them. count: batches.
    """

    train: Sequence[int]
    held: Sequence[int]
    size: int
    count: int

    def batches(self, lessons: Sequence[int]) -> list[int]:
        """The numbers of the batches of ``lessons``."""
        each = (range(n * self.size, min((n + 1) * self.size, self.count)) for n in lessons)
        return [index for batches in each for index in batches]


class Fitter(Interpreter):
    """An interpreter that runs one region over and over on values that stay where they are."""

    _readers: Sequence[tuple[fx.Node, str]] = ()
    _derived: Sequence[fx.Node] = ()

    def prepare(self, start: int, stop: int, end: int, trained: Sequence[str] = ()) -> Work:
        """Make [start, stop) ready to run more than once; ``trained`` are given by :meth:`take` each time."""
        region = Region(start, stop, end, again=True)
        names = set(trained)
        self.load_weights(region)
        self._readers = [
            (node, canonical)
            for node in self.flow.order
            if (name := self.program.parameter(node)) is not None
            and (canonical := self.program.weights.canonical(name)) in names
        ]
        read = {node for node, _ in self._readers}
        # What no batch changes and is made of a trained weight: a view, a cast. Made anew for every step.
        self._derived = [
            node
            for node in self.resident
            if node not in read and not names.isdisjoint(self.flow.parameters.get(node, frozenset()))
        ]
        return self.ready(region)

    def take(self, values: Mapping[str, Tensor]) -> None:
        """Go on with these values of the trained parameters."""
        for node, name in self._readers:
            self.resident[node] = values[name].to(device=self.device, dtype=node.meta["val"].dtype)
        for node in self._derived:
            self.resident.pop(node, None)
        for node in self._derived:
            self.static(node)

    def give(self, work: Work, index: int, wanted: fx.Node) -> Tensor:
        """The value of ``wanted`` for batch ``index``."""
        env: dict[fx.Node, Any] = {**self.resident, **self.begin(work, index)}
        self.env = env
        for node in work.nodes:
            env[node] = self.compute(node)
            for dead in work.dying.get(node, ()):
                if dead is not wanted:
                    del env[dead]
        self.env = {}
        found = env[wanted]
        assert isinstance(found, Tensor)
        return found

    def forget(self) -> None:
        """Free the region's weights."""
        self.resident.clear()
        self._readers, self._derived = (), ()


@dataclass
class Fit:
    """The training of one region.

    Attributes:
        work, output: the region, made ready, and the value that is judged.
        judge: the loss of a batch, from that value.
        world: the processes that share the batches of a step, and those that are judged by.
    """

    fitter: Fitter
    work: Work
    output: fx.Node
    judge: Judge
    own: RegionPass
    label: str
    world: World = ALONE

    def loss(self, lessons: Lessons) -> float:
        """The mean loss over the lessons that are held back, with the weights as they are taken."""
        batches = lessons.batches(lessons.held)
        with torch.no_grad():
            own = [float(self.judge(i, self.fitter.give(self.work, i, self.output))) for i in self._own(batches)]
        return sum(loss for part in self.world.told(own) for loss in part) / len(batches)

    def _own(self, batches: Sequence[int]) -> Sequence[int]:
        """This process's part, which may be none."""
        start, stop = self.world.bounds(len(batches))
        return batches[start:stop]

    def train(
        self, masters: Masters, rate: float, epochs: int, lessons: Lessons, seed: int, tell: Callable[[int], None]
    ) -> None:
        """Adam on ``masters``, in place; entries that are not kept stay what they are.

        Args:
            tell: told of every epoch that begins.

        Raises:
            CalibrationError: a loss or gradient that is no number.
        """
        sizes = masters.sizes()
        groups = [{"params": [value], "lr": 0.0, "size": sizes[name]} for name, value in masters.values.items()]
        optimizer = torch.optim.Adam(groups, betas=BETAS)
        rows = max(1, len(next(iter(self.fitter.batches[0].values()))))
        together = max(1, self.own.batch // (rows * lessons.size))
        order = torch.Generator().manual_seed(seed)
        each = -(-len(lessons.train) // together)
        steps, step = epochs * each, 0
        for epoch in range(epochs):
            tell(epoch)
            shuffled = [lessons.train[i] for i in torch.randperm(len(lessons.train), generator=order).tolist()]
            for first in range(0, len(shuffled), together):
                chosen = lessons.batches(shuffled[first : first + together])
                share = self.own.share(step, steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate * share * group["size"]
                self._step(masters, optimizer, chosen, rate, epoch)
                step += 1

    def _step(
        self, masters: Masters, optimizer: torch.optim.Optimizer, chosen: Sequence[int], rate: float, epoch: int
    ) -> None:
        optimizer.zero_grad(set_to_none=True)
        for index in self._own(chosen):
            with torch.enable_grad():
                self.fitter.take(masters.values)
                loss = self.judge(index, self.fitter.give(self.work, index, self.output)) / len(chosen)
                loss.backward()
        self.world.share_gradients(list(masters.values.values()))
        names = [name for name, value in masters.values.items() if value.grad is not None]
        masters.hold(names)
        grads = [masters.values[name].grad for name in names]
        if not all(grad is not None and all_finite(grad) for grad in grads):
            raise CalibrationError(
                f"refining {self.label} at rate {rate:g}",
                found=f"a loss or gradient that is NaN or infinite in epoch {epoch + 1}",
                do="Give a smaller rate, or rate=auto; where float16 overflows take --compute-dtype float32",
            )
        optimizer.step()
