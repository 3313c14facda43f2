"""Two models on the same windows: by how much perplexity differs, how sure that is, and what it is called.

Of each window the losses of both models are subtracted. The mean of these differences is the logarithm of the ratio of
the perplexities, and their spread says how far other windows would have moved it: much less than each perplexity moves,
for what is hard in a window is hard for both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# Ratios of perplexities from which a model is called so; docs/commands.md has the table.
SLIGHTLY, CLEARLY, MUCH, FAR = 1.01, 1.05, 1.25, 2.0
# A difference within so many standard errors is said to be none.
SURE = 2.0
# Of fewer windows the spread itself is hardly known.
FEW = 8

Level = Literal["no number", "none", "better", "practically the same", "slightly", "clearly", "much", "far"]


@dataclass(frozen=True)
class Paired:
    """One model against another on the same windows.

    Attributes:
        difference: mean difference of the losses: the logarithm of the ratio. Infinity where one is no number.
        standard_error: of that mean, the windows taken as independent: the ratio's relative error. None of one window.
        base: what the other perplexity is called. do: what to do where the model is clearly worse.
    """

    difference: float
    standard_error: float | None
    windows: int
    base: str = "the first perplexity"
    do: str = ""

    @classmethod
    def of(cls, losses: Sequence[float], others: Sequence[float], base: str = base, do: str = "") -> Paired:
        """The model with ``losses``, one for each window, against the one with ``others``."""
        pairs, count = [one - other for one, other in zip(losses, others, strict=True)], len(losses)
        if not all(map(math.isfinite, pairs)):
            return cls(math.inf, None, count, base, do)
        mean = math.fsum(pairs) / count
        squares = math.fsum((pair - mean) ** 2 for pair in pairs)
        error = math.sqrt(squares / (count - 1) / count) if count > 1 else None
        return cls(mean, error, count, base, do)

    @property
    def ratio(self) -> float:
        """The perplexity over the other one."""
        try:
            return math.exp(self.difference)
        except OverflowError:
            return math.inf

    @property
    def level(self) -> Level:
        """What the difference is called."""
        ratio, error = self.ratio, self.standard_error
        if math.isinf(ratio):
            return "no number"
        if error is not None and abs(self.difference) <= SURE * error:
            return "none"
        if ratio <= 1 / SLIGHTLY:
            return "better"
        names: tuple[tuple[float, Level], ...] = (
            (SLIGHTLY, "practically the same"),
            (CLEARLY, "slightly"),
            (MUCH, "clearly"),
            (FAR, "much"),
        )
        return next((name for limit, name in names if ratio < limit), "far")

    @property
    def verdict(self) -> str:
        """One sentence: the ratio, what it is called, and what to do where it is much."""
        level, error = self.level, self.standard_error
        if level == "no number":
            return "its perplexity is no number: this model predicts nothing" + self._then(self.do)
        said = f"{self.ratio:.3f}" if self.ratio < 100 else f"{self.ratio:.3g}"
        said = f"{said} times {self.base}: "
        if level == "none":
            assert error is not None
            most = math.exp(self.difference + SURE * error)
            said += f"no difference that {_windows(self.windows)} can show"
            return said + self._then(f"{most:.3f} times would look the same, so take more" if most > CLEARLY else "")
        worse = level in ("slightly", "clearly", "much", "far")
        said += f"{level} worse" if worse else level
        if error is None:
            said += ", as far as one window can tell"
        elif self.windows < FEW:
            said += f", as far as {_windows(self.windows)} can tell"
        return said + self._then(self.do if level in ("clearly", "much", "far") else "")

    @staticmethod
    def _then(text: str) -> str:
        return f"; {text}" if text else ""


def _windows(count: int) -> str:
    return "one window" if count == 1 else f"{count} windows"
