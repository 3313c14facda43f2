"""The text of an option that gives kinds of layers percentages of their own: ``down_proj@45%/q_proj@62.5%``."""

from __future__ import annotations

from collections.abc import Mapping

from sparsify.errors import PatternError, SpecError
from sparsify.method.pattern import Unstructured, parse_pattern


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
