"""The weights of a manifest as blocks × kinds: what each pass says of them, put where they are in the model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparsify.provenance.places import place_of


@dataclass
class Cell:
    """The weights of one kind in one block, most often one.

    Attributes:
        sites: what the last pass that pruned each says of it. left: names that no pass pruned, and why.
    """

    sites: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return sum(math.prod(site["shape"]) for site in self.sites.values())

    @property
    def kept(self) -> float | None:
        """The share of numbers that are not zero; None where nothing was pruned."""
        if not self.sites:
            return None
        kept = sum(site["kept"] * math.prod(site["shape"]) for site in self.sites.values())
        return float(kept / max(1, self.size))

    @property
    def error(self) -> float | None:
        """The mean error of its outputs; None where none was measured."""
        known = [error for site in self.sites.values() if (error := site.get("error")) is not None]
        return sum(known) / len(known) if known and all(map(math.isfinite, known)) else None

    @property
    def patterns(self) -> str:
        return ", ".join(dict.fromkeys(str(site["pattern"]) for site in self.sites.values()))


@dataclass
class Stack:
    """Blocks that follow each other, ``model.layers``; or, with ``name`` empty, what is in no block."""

    name: str
    cells: dict[tuple[str, str], Cell] = field(default_factory=dict)

    @property
    def blocks(self) -> list[str]:
        """In their order."""
        return sorted({block for block, _ in self.cells}, key=lambda block: (len(block), block))

    @property
    def kinds(self) -> list[str]:
        """In the order in which passes came to them, those of one module together."""
        found = list(dict.fromkeys(kind for _, kind in self.cells))
        modules = list(dict.fromkeys(kind.rpartition(".")[0] for kind in found))
        return sorted(found, key=lambda kind: modules.index(kind.rpartition(".")[0]))

    def cell(self, block: str, kind: str) -> Cell:
        return self.cells.setdefault((block, kind), Cell())


def stacks_of(passes: Sequence[Mapping[str, Any]]) -> list[Stack]:
    """Every weight that ``passes`` of a manifest name, those in blocks first."""
    stacks: dict[str, Stack] = {}
    pruned = {site["name"] for own in passes for site in own["sites"]}
    for own in passes:
        for site in own["sites"]:
            stack, block, kind = place_of(site["name"])
            stacks.setdefault(stack, Stack(stack)).cell(block, kind).sites[site["name"]] = site
    for name, reason in left_by(passes):
        stack, block, kind = place_of(name)
        # Elsewhere it may be a node of the graph; the page lists all of them in words.
        if stack in stacks and name not in pruned:
            stacks[stack].cell(block, kind).left[name] = reason
    return sorted(stacks.values(), key=lambda stack: not stack.name and stack.blocks == [""])


def left_by(passes: Sequence[Mapping[str, Any]]) -> Iterable[tuple[str, str]]:
    """Names that passes left as they were, with the reason."""
    for own in passes:
        for skipped in own.get("skipped", ()):
            yield str(skipped.get("name", "")), str(skipped.get("reason", ""))
