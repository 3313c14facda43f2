"""Sparsity patterns as values: what fraction or arrangement of zeros is asked for.

``50%`` and ``0.5`` are unstructured; ``2:4`` keeps N = 2 of every M = 4 consecutive input features, which is
NVIDIA's meaning. (The papers' code counts the zeros instead; both agree for 2:4 and 4:8.) What is rounded has no
pattern of zeros but lies on a grid of few bits: ``int8``, ``int4`` or ``int3``. Kinds of layers may have percentages
of their own: ``down_proj@45%/q_proj@62.5%``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from sparsify.errors import PatternError, SpecError

# Longer ones are no numbers that anybody means, and Python converts no number of 5000 digits.
_LONGEST = 64
_FORMS = "Write a percentage (50%), a fraction of zeros (0.5), or N:M (2:4 keeps 2 of every 4)"
_BITS = (8, 4, 3)
_GRIDS = "Write int8, int4 or int3"


@dataclass(frozen=True)
class Unstructured:
    """A fraction of zeros with no arrangement, strictly between 0 and 1.

    The fraction is held exactly, so that ``29%`` of 100 can mean 29 (``count`` in :mod:`sparsify.method.selection`).
    """

    sparsity: Fraction

    def __init__(self, sparsity: Fraction | float | str) -> None:
        # Fraction(repr(0.29)) is 29/100, Fraction(0.29) is not.
        try:
            exact = sparsity if isinstance(sparsity, Fraction) else Fraction(str(sparsity))
        except (ValueError, ZeroDivisionError) as error:
            raise PatternError(f"sparsity {sparsity}", found="not a number", do=_FORMS) from error
        object.__setattr__(self, "sparsity", exact)
        if not 0 < exact < 1:
            raise PatternError(
                f"sparsity {self if isinstance(sparsity, Fraction) else sparsity}",
                found="not strictly between 0 and 1 (0% prunes nothing, 100% leaves nothing)",
                do=_FORMS,
            )

    def __str__(self) -> str:
        percent = self.sparsity * 100
        if percent.denominator == 1:
            return f"{percent.numerator}%"
        return f"{format(float(percent), '.12g')}%"

    def unfit(self, in_features: int) -> str | None:
        """Why this pattern cannot be laid on rows of ``in_features`` weights, or None: it always can."""
        return None


@dataclass(frozen=True)
class NM:
    """At most ``n`` non-zero weights in each run of ``m`` consecutive input features of an output neuron."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m:
            raise PatternError(
                f"pattern {self.n}:{self.m}",
                found="N:M keeps N of every M weights and needs 1 ≤ N < M",
                do=f"Did you mean {self.m}:{self.n}?" if 1 <= self.m < self.n else _FORMS,
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> Fraction:
        return Fraction(self.m - self.n, self.m)

    def unfit(self, in_features: int) -> str | None:
        """Why this pattern cannot be laid on rows of ``in_features`` weights, or None."""
        if in_features % self.m:
            return f"in_features {in_features} is not a multiple of {self.m}"
        return None


Pattern = Unstructured | NM


def parse_pattern(text: str) -> Pattern:
    """Return the pattern that ``text`` spells; ``parse_pattern(str(p)) == p``.

    Raises:
        PatternError: ``text`` is no pattern, or one that cannot hold.
    """
    text = text.strip()
    if len(text) > _LONGEST:
        raise PatternError(f"pattern '{text[:_LONGEST]}…'", found=f"{len(text)} characters", do=_FORMS)
    if match := re.fullmatch(r"(\d+):(\d+)", text, re.ASCII):
        return NM(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)%", text, re.ASCII):
        return Unstructured(Fraction(match[1]) / 100)
    if re.fullmatch(r"0?\.\d+|[01]\.\d+", text, re.ASCII):
        return Unstructured(Fraction(text))
    if re.fullmatch(r"\d+(\.\d+)?", text, re.ASCII):
        raise PatternError(
            f"sparsity '{text}'",
            found="a bare number of 1 or more, or a whole number without %",
            do=f"Write {text}% for a percentage, or a fraction below 1 such as 0.5",
        )
    raise PatternError(f"pattern '{text}'", found="not a pattern that sparsify knows", do=_FORMS)


@dataclass(frozen=True)
class Grid:
    """2^bits neighbouring integers, 0 among them, times a scale."""

    bits: int

    def __post_init__(self) -> None:
        if self.bits not in _BITS:
            raise PatternError(f"grid {self}", found=f"{self.bits} bits, and 8, 4 and 3 are what there is", do=_GRIDS)

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
        raise PatternError(f"grid '{text.strip()[:32]}'", found="not a grid that sparsify knows", do=_GRIDS)
    return Grid(int(found[1]))


def parse_shares(text: str) -> dict[str, Unstructured]:
    """Percentages by kind, in the order given; ``parse_shares(shares_text(s)) == s``.

    Raises:
        SpecError: something that is no KIND@PERCENTAGE, or a kind that is named twice.
    """
    found: dict[str, Unstructured] = {}
    for part in text.split("/") if text else ():
        kind, at, share = (piece.strip() for piece in part.rpartition("@"))
        asked = f"kinds={text}"
        if not at or not kind:
            raise SpecError(asked, found=f"'{part}', which is no KIND@PERCENTAGE", do="Write down_proj@45%/q_proj@60%")
        if kind in found:
            raise SpecError(asked, found=f"{kind} twice", do="Give it once")
        try:
            pattern = parse_pattern(share)
        except PatternError as error:
            raise SpecError(asked, found=f"'{share}' for {kind}: {error.found}", do=error.do) from error
        if not isinstance(pattern, Unstructured):
            raise SpecError(asked, found=f"{pattern} for {kind}", do="Give kinds percentages")
        found[kind] = pattern
    return found


def shares_text(shares: Mapping[str, Unstructured]) -> str:
    """The text that parses to ``shares``."""
    return "/".join(f"{kind}@{share}" for kind, share in shares.items())


def belongs(kind: str, name: str) -> bool:
    """Whether ``name`` calls the site kind ``kind``: the whole of it, or what stands behind any of its dots."""
    return kind == name or kind.endswith(f".{name}")
