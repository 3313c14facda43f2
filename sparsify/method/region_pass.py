"""What a region pass is: mathematics that fits one region of a model to what the same region of the dense model gives.

It knows no graph, no file and no optimizer's state; where regions are cut, both streams of activations, held-back
sequences and what is written are :mod:`sparsify.refine`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from sparsify.errors import SpecError
from sparsify.method.base import Change, Kind, Pass

Last = Literal["kl", "error"]
Rate = float | Literal["auto"]


@dataclass(frozen=True)
class RegionPass(Pass):
    """Base of passes that train what is left of the weights, region by region; zeros stay zeros.

    Attributes:
        epochs: how often every sequence is seen.
        batch: sequences of one step.
        rate: the step of each tensor, relative to the root mean square of its kept entries; ``auto``: one epoch with
            each of four (0.06, 0.02, 0.006, 0.002), then all epochs with the largest that gained almost as much as the
            best of them on the sequences that are held back.
        guard: share of the calibration sequences that are held back, in whole batches; a region that gains nothing on
            them stays as it was, to the bit.
        last: what the last region is fitted to: the dense model's predictions (``kl``), or its hidden values as every
            other (``error``).
    """

    epochs: int = 5
    rate: Rate = "auto"
    last: Last = "kl"
    guard: float = 0.125
    batch: int = 4

    kind: ClassVar[Kind] = "regions"
    follows: ClassVar[frozenset[Kind]] = frozenset({"structure", "graph", "channels", "weights", "regions"})
    misplaced: ClassVar[str] = "weights that are rounded or packed by then"
    changes: ClassVar[frozenset[Change]] = frozenset({"weights"})

    @property
    def needs_data(self) -> bool:
        return True

    def __post_init__(self) -> None:
        for option, usual in (("epochs", 5), ("batch", 4)):
            if getattr(self, option) < 1:
                raise self._refuse(f"{option}={getattr(self, option)}", "it must be at least 1", f"Choose {usual}, say")
        if not 0 < self.guard <= 0.5:
            raise self._refuse(f"guard={self.guard:g}", "no share between 0 and one half", "Choose 0.125, say")
        if not isinstance(self.rate, str) and not 0 < self.rate < 1:
            raise self._refuse(
                f"rate={self.rate:g}", "no share of a weight's size, between 0 and 1", "Choose 0.01, say, or auto"
            )

    @property
    def ladder(self) -> tuple[float, ...]:
        """The rates that are tried."""
        raise NotImplementedError

    def error(self, output: Tensor, target: Tensor, counted: Tensor | None) -> Tensor:
        """The loss of a region: a scalar.

        Args:
            output, target: [tokens…, width], of the region and of the dense model's. counted: [tokens…], False where
                there is padding; None counts all.
        """
        raise NotImplementedError

    def divergence(self, logits: Tensor, target: Tensor, counted: Tensor | None) -> Tensor:
        """The loss of the last region with ``last=kl``: a scalar, from [tokens…, vocabulary]."""
        raise NotImplementedError

    def share(self, step: int, steps: int) -> float:
        """What of the rate step ``step`` (from 0) of ``steps`` takes."""
        raise NotImplementedError

    def _refuse(self, asked: str, found: str, do: str) -> SpecError:
        return SpecError(f"{self.name}:{asked}", found=found, do=do)
