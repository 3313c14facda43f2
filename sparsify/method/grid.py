"""Grids of few bits as values: ``int8``, ``int4``, ``int3``: scale × integer, one scale to a group of weights."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sparsify.errors import PatternError

BITS = (8, 4, 3)
_FORMS = "Write int8, int4 or int3"


@dataclass(frozen=True)
class Grid:
    """2^bits neighbouring integers, 0 among them, times a scale."""

    bits: int

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise PatternError(f"grid {self}", found=f"{self.bits} bits, and 8, 4 and 3 are what there is", do=_FORMS)

    def __str__(self) -> str:
        return f"int{self.bits}"

    @property
    def half(self) -> int:
        """Half of its integers: those of a symmetric grid are −half … half − 1, or with the signs turned."""
        return 1 << (self.bits - 1)

    @property
    def span(self) -> int:
        """The largest of its integers less the smallest."""
        return (1 << self.bits) - 1

    def unfit(self, in_features: int) -> str | None:
        """Why rows of ``in_features`` weights cannot lie on it: they always can, for a last group may be shorter."""
        return None


def is_grid(text: str) -> bool:
    """Whether ``text`` means a grid, and no pattern of zeros."""
    return text.strip().startswith("int")


def parse_grid(text: str) -> Grid:
    """Return the grid that ``text`` spells; ``parse_grid(str(g)) == g``.

    Raises:
        PatternError: ``text`` is no grid, or one that there is not.
    """
    found = re.fullmatch(r"int(\d{1,3})", text.strip(), re.ASCII)
    if found is None:
        raise PatternError(f"grid '{text.strip()[:32]}'", found="not a grid that sparsify knows", do=_FORMS)
    return Grid(int(found[1]))
