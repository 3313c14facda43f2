"""A budget as text: ``perplexity<=1.05`` (times the dense model's), ``perplexity<=+5%``, ``perplexity<=12.3abs``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from sparsify.errors import SpecError, near

_FORMS = (
    "Write perplexity<=1.05 or perplexity<=+5% (against the dense model), or perplexity<=12.3abs (the number itself)"
)
# A bare number past it is sooner a perplexity than how many times the dense model's.
_MOST_BARE = 2.0


@dataclass(frozen=True)
class Budget:
    """How large the perplexity may be: ``most`` times the dense model's or, where ``absolute``, ``most`` itself."""

    most: float
    absolute: bool = False

    def limit(self, dense: float) -> float:
        """The largest perplexity within the budget, given the dense model's."""
        return self.most if self.absolute else self.most * dense

    def __str__(self) -> str:
        return f"perplexity<={self.most:.12g}{'abs' if self.absolute else 'x'}"


def parse_budget(text: str) -> Budget:
    """The budget that ``text`` spells; ``parse_budget(str(b)) == b``.

    Raises:
        SpecError: it is none.
    """
    if not isinstance(text, str):
        raise SpecError(f"budget {text!r}", found=type(text).__name__, do=_FORMS)
    asked, words = f"budget '{text}'", re.fullmatch(r"\s*([A-Za-z_-]*)\s*(<=|≤|>=|<|>|==|=|)\s*(.*?)\s*", text)
    if words is None or not words[1]:
        raise SpecError(asked, found="nothing to measure named", do=_FORMS)
    if words[1] != "perplexity":
        raise SpecError(asked, found=f"'{words[1]}', which is not measured", do=f"{near(words[1], ['perplexity'])}")
    if words[2] not in ("<=", "≤"):
        raise SpecError(asked, found=f"'{words[2]}' for <=" if words[2] else "no <=", do=_FORMS)
    number = re.fullmatch(r"(\+?)(\d+(?:\.\d+)?|\.\d+)(x|%|abs|)", words[3], re.ASCII)
    value = float(number[2]) if number is not None and len(number[2]) < 32 else math.inf
    if number is None or not math.isfinite(value) or (number[3] == "%") != (number[1] == "+"):
        raise SpecError(asked, found=f"'{words[3]}', which is no bound", do=_FORMS)
    if number[3] == "abs":
        if value < 1:
            raise SpecError(asked, found="a perplexity below 1, which no model has", do=_FORMS)
        return Budget(value, absolute=True)
    if number[3] == "%":
        value = 1 + value / 100
    if value < 1:
        raise SpecError(asked, found=f"{value:g} times the dense model's, which is better than that", do=_FORMS)
    if not number[3] and value > _MOST_BARE:
        raise SpecError(
            asked,
            found=f"{value:g} times the dense model's perplexity, if it is meant so",
            do=f"Write perplexity<={value:g}x for that, or perplexity<={value:g}abs for the perplexity itself",
        )
    return Budget(value)
