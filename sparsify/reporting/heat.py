"""Blocks × kinds as a map of colours: one hue and one scale each, with the number of every cell as text.

It is a grid of HTML: its colours follow the reader's scheme, and where the page is narrow blocks go down instead of
to the right. Cells that no pass pruned are hatched, those of which the value is not known are empty frames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sparsify.provenance.places import short_names
from sparsify.reporting.layers import Cell, Stack
from sparsify.reporting.markup import Markup, joined, tag

# More blocks than this: cells are too small for numbers; and of so many, only some are labelled.
_LEGIBLE, _LABELS = 16, 20
# Shares of the scale past which ink is the other one, in a dark and in a light scheme: 3.7 to 1 at least either way.
_MIDDLE, _HIGH = 0.58, 0.7


@dataclass(frozen=True)
class Scale:
    """What a map shows.

    Attributes:
        name: of its hue, in the style. title: in words. legend: which way is which.
        value: of a cell, from 0 to ``top``; None where there is none. form: of a value, as text.
    """

    name: str
    title: str
    legend: str
    top: float
    value: Callable[[Cell], float | None]
    form: Callable[[float], str]


def heat_map(stack: Stack, scale: Scale) -> Markup:
    """The map of one stack of blocks."""
    blocks, kinds = stack.blocks, stack.kinds
    step = -(-len(blocks) // _LABELS)
    parts = [
        tag("span", label, class_="kind", style=f"--k:{number}", title=kind)
        for number, (kind, label) in enumerate(zip(kinds, short_names(kinds), strict=True), 2)
    ]
    parts += [
        tag("span", block, class_="block" if at % step == 0 else "block skip", style=f"--b:{at + 2}")
        for at, block in enumerate(blocks)
    ]
    for b, block in enumerate(blocks, 2):
        for k, kind in enumerate(kinds, 2):
            if (cell := stack.cells.get((block, kind))) is not None:
                parts.append(_cell(f"{stack.name}.{block} {kind}", cell, scale, f"--b:{b};--k:{k}", len(blocks)))
    known = [v for cell in stack.cells.values() if (v := scale.value(cell)) is not None]
    said = f"{scale.title} of {len(kinds)} kinds of layers in {len(blocks)} blocks of {stack.name}"
    if known:
        said += f", from {scale.form(min(known))} to {scale.form(max(known))}; the numbers are in the table beneath"
    size = "many" if len(blocks) > _LEGIBLE else "few"
    return tag(
        "div",
        *parts,
        class_=f"heat {scale.name} {size}",
        role="img",
        aria_label=said,
        style=f"--blocks:{len(blocks)};--kinds:{len(kinds)}",
    )


def _cell(where: str, cell: Cell, scale: Scale, place: str, blocks: int) -> Markup:
    value = scale.value(cell)
    if value is None:
        kind = "unknown" if cell.sites else "none"
        return tag("span", class_=f"cell {kind}", style=place, title=f"{where}: {described(cell)}")
    share = min(1.0, max(0.0, value / scale.top)) if scale.top else 0.0
    ink = " high" if share > _HIGH else " middle" if share > _MIDDLE else ""
    shown = scale.form(value) if blocks <= _LEGIBLE else None
    style = f"{place};--v:{share * 100:.1f}%"
    return tag("span", shown, class_=f"cell{ink}", style=style, title=f"{where}: {described(cell)}")


def described(cell: Cell) -> str:
    """A cell in words."""
    said = []
    if (kept := cell.kept) is not None:
        said.append(f"kept {kept:.2%} ({cell.patterns})")
        said.append("error not measured" if cell.error is None else f"error {cell.error:.4f}")
    if cell.left:
        count = f"{len(cell.left)} weights " if len(cell.left) > 1 else ""
        said.append(f"{count}not pruned: {'; '.join(dict.fromkeys(cell.left.values()))}")
    return ", ".join(said) or "nothing is said of it"


def legend(scale: Scale, cells: Sequence[Cell]) -> Markup:
    """The scale as a bar with its ends, and what is which in words; of what there is among ``cells``."""
    bar = tag("span", class_=f"bar {scale.name}")
    parts: list[object] = [tag("span", scale.form(0.0)), bar, tag("span", scale.form(scale.top))]
    for kind, name in (("none", "not pruned"), ("unknown", "not measured")):
        if any(scale.value(cell) is None and bool(cell.sites) == (kind == "unknown") for cell in cells):
            parts.append(joined([tag("span", class_=f"cell {kind} swatch"), name]))
    return tag("p", tag("span", *parts, class_="scale"), " ", scale.legend, class_="legend")


def number_table(stacks: Sequence[Stack], forms: Mapping[str, Callable[[Cell], str]]) -> list[tuple[str, ...]]:
    """Every cell as a row: block, kind, and what ``forms`` say of it."""
    rows, alone = [], sum(bool(stack.name) for stack in stacks) == 1
    for stack in stacks:
        kinds = stack.kinds
        for block in stack.blocks:
            for kind in kinds:
                if (cell := stack.cells.get((block, kind))) is not None:
                    name = block if alone else f"{stack.name}.{block}".strip(".")
                    rows.append((name or "–", kind, *(form(cell) for form in forms.values())))
    return rows
