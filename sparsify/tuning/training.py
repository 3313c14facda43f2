"""The loop: AdamW on what is trained, with a warm-up and a linear decay, zeros put back after every step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsify.context import Progress, report
from sparsify.errors import CalibrationError
from sparsify.runtime.cpu.wide import wide_products
from sparsify.tuning.distillation import Distillation
from sparsify.tuning.recipe import Recipe
from sparsify.tuning.state import TuneState
from sparsify.world.world import ALONE, World


@dataclass(frozen=True)
class Training:
    """What a run trains, on what and for how long.

    Attributes:
        wrapped, network: what is trained, and the model itself inside it. ids: [sequences, length].
        masks: parameter -> True where a weight is kept. lessons: the teacher's part in the loss, or None.
        world: the processes that share the sequences of each step.
    """

    wrapped: nn.Module
    network: nn.Module
    ids: Tensor
    recipe: Recipe
    steps: int
    masks: Mapping[str, Tensor]
    device: torch.device
    lessons: Distillation | None = None
    world: World = ALONE

    def run(self, state: TuneState, save_every: int, observe: Callable[[int, int, float], None]) -> None:
        """A plain loop. Of several processes each takes its part of every step; gradients and losses are brought
        together, so that all make the same steps.

        Args:
            observe: told (step, steps, loss).

        Raises:
            CalibrationError: a loss or gradients that are no number.
        """
        recipe, steps, world = self.recipe, self.steps, self.world
        optimizer = torch.optim.AdamW(state.trained.values(), lr=recipe.highest_rate, weight_decay=0.0)
        state.restore(optimizer)
        held = dict(self.network.named_parameters())
        kept = {n: mask.to(held[n].device) for n, mask in self.masks.items() if recipe.method == "full"}
        deadline = time.monotonic() + 60 * recipe.minutes if recipe.minutes is not None else math.inf
        for number, chosen in enumerate(orders(len(self.ids), recipe, steps)):
            if number < state.step:
                continue
            # Clocks differ: the first one's counts.
            if recipe.minutes is not None and world.told(time.monotonic() > deadline)[0]:
                break
            world.says(f"training, step {number + 1}")
            for group in optimizer.param_groups:
                group["lr"] = recipe.highest_rate * rate_share(number, steps, recipe.warmup)
            losses: list[tuple[Tensor, int]] = []
            for micro in parts(chosen, recipe, world):
                with wide_products():
                    loss = self._loss(micro)
                    (loss * len(micro) / recipe.batch).backward()
                losses.append((loss.detach(), len(micro)))
            world.share_gradients(list(state.trained.values()))
            # Once a step: a GPU that is asked after every part stands still meanwhile.
            own = [float(loss) * count / recipe.batch for loss, count in losses]
            total = sum((loss for one in world.told(own) for loss in one), start=0.0)
            if not math.isfinite(total):
                if self.lessons is not None:
                    self.lessons.check(number)
                raise _refused(number, f"a loss of {total}")
            if not math.isfinite(float(nn.utils.clip_grad_norm_(state.trained.values(), 1.0))):
                raise _refused(number, "gradients that are NaN or infinite")
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for name, mask in kept.items():
                    held[name].mul_(mask)
            state.step, state.losses = number + 1, [*state.losses, total]
            report(Progress("training", number + 1, steps, f"loss {total:.3f}"))
            observe(number + 1, steps, total)
            if state.step % save_every == 0:
                state.save(optimizer)

    def _loss(self, micro: Tensor) -> Tensor:
        """The mean loss of the sequences ``micro`` [sequences], a scalar."""
        batch = self.ids[micro].to(self.device)
        logits = self.wrapped(input_ids=batch).logits
        if self.lessons is not None:
            return self.lessons.loss(logits, batch, micro)
        return nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())


def orders(count: int, recipe: Recipe, steps: int) -> Iterator[Tensor]:
    """The sequences of each step: every epoch in an order of its own, the same ones at every run."""
    generator = torch.Generator().manual_seed(recipe.seed)
    waiting = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(waiting) < recipe.batch:
            waiting = torch.cat([waiting, torch.randperm(count, generator=generator)])
        yield waiting[: recipe.batch]
        waiting = waiting[recipe.batch :]


def parts(chosen: Tensor, recipe: Recipe, world: World) -> Sequence[Tensor]:
    """Of the sequences of a step what this process trains on, so many at once as fit.

    Raises:
        ProcessError: a step has fewer such parts than there are processes.
    """
    return world.share(chosen.split(recipe.micro), "parts of one step (--batch over --micro)", "--batch")


def rate_share(step: int, steps: int, warmup: int) -> float:
    """Of the highest rate: up over the warm-up (a tenth of a short run), then down to nothing."""
    rising = max(1, min(warmup, steps // 10))
    return min((step + 1) / rising, (steps - step) / max(1, steps - rising))


def _refused(step: int, found: str) -> CalibrationError:
    return CalibrationError(f"tuning, step {step + 1}", found=found, do="Give a smaller --rate")
