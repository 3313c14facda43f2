"""The section of layers: heat maps, a line for each kind, and every number as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sparsify.provenance.markdown import short
from sparsify.reporting.facts import Facts
from sparsify.reporting.heat import Scale, heat_map, legend, number_table
from sparsify.reporting.layers import Cell, Stack
from sparsify.reporting.markup import Markup, code, section, table, tag


def layers(facts: Facts) -> Markup:
    """Heat maps of error and of what was kept, a line for each kind, and every number as text."""
    stacks = facts.stacks
    if not any(cell.sites for stack in stacks for cell in stack.cells.values()):
        return Markup("")
    errors = [error for stack in stacks for cell in stack.cells.values() if (error := cell.error) is not None]
    maps: list[object] = []
    if errors:
        what = "Relative error of outputs"
        way = "Stronger colour: a larger error, which is worse. At 0 outputs are as they were."
        maps += _maps(stacks, Scale("error", what, way, max(errors), lambda cell: cell.error, "{:.3f}".format))
    what, way = (
        "Share of numbers kept",
        "Stronger colour: more numbers kept, closer to the dense model and less sparse.",
    )
    maps += _maps(stacks, Scale("kept", what, way, 1.0, lambda cell: cell.kept, "{:.0%}".format))
    forms: dict[str, Callable[[Cell], str]] = {
        "kept": lambda cell: "–" if cell.kept is None else f"{cell.kept:.2%}",
        "error": lambda cell: "–" if cell.error is None else f"{cell.error:.4f}",
        "pattern, or why not pruned": lambda cell: short(
            "; ".join(filter(None, (cell.patterns, *sorted(set(cell.left.values())))))
        ),
    }
    rows = number_table(stacks, forms)
    every = tag(
        "details",
        tag("summary", f"Every number as a table ({len(rows)} rows)"),
        table(("block", "kind", *forms), rows, (2, 3)),
    )
    return section("Layer by layer", _note(facts), *maps, tag("h3", "By kind"), _kinds(stacks), every)


def _note(facts: Facts) -> Markup:
    """What the numbers are, and what came after them."""
    said = "An error is ‖XWᵀ − XŴᵀ‖ / ‖XWᵀ‖ over the calibration data: how far the outputs of a layer moved"
    twin = any(own.get("name") == "twin" for own in facts.passes)
    said += " (of twin, the first X is what the layer reads in the dense model)." if twin else "."
    steps = facts.pruning_steps
    if len(steps) > 1:
        said += f" All is of step {steps[-1]}, the last that pruned; sparsify.json keeps no layers of earlier steps."
    if any(own.get("regions") for own in facts.passes):
        said += " Errors are of the weights as they were pruned, before blocks were trained."
    if facts.trained_since:
        said += " They are from before the training that followed."
    return tag("p", said)


def _maps(stacks: Sequence[Stack], scale: Scale) -> list[Markup]:
    shown = [stack for stack in stacks if stack.blocks != [""]]
    if not shown:
        return []
    cells = [cell for stack in shown for cell in stack.cells.values()]
    parts = [tag("h3", scale.title), legend(scale, cells)]
    for stack in shown:
        parts += [tag("p", code(stack.name), class_="stack")] if len(shown) > 1 else []
        parts.append(heat_map(stack, scale))
    return parts


def _kinds(stacks: Sequence[Stack]) -> Markup:
    rows = []
    for stack in stacks:
        for kind in stack.kinds:
            own = {block: cell for (block, name), cell in stack.cells.items() if name == kind}
            cells = [cell for cell in own.values() if cell.sites]
            shapes = sorted({"×".join(map(str, site["shape"])) for cell in cells for site in cell.sites.values()})
            errors = {block: cell.error for block, cell in own.items() if cell.error is not None}
            worst = max(errors, key=lambda block: errors[block] or 0, default=None)
            size = sum(cell.size for cell in cells)
            kept = sum((cell.kept or 0) * cell.size for cell in cells)
            left = sum(len(cell.left) for cell in own.values())
            rows.append(
                (
                    code(f"{stack.name}.*.{kind}" if len(stacks) > 1 and stack.name else kind),
                    str(sum(len(cell.sites) for cell in cells)),
                    str(left or "–"),
                    ", ".join(shapes[:3]) + ("…" if len(shapes) > 3 else "") or "–",
                    f"{kept / size:.2%}" if size else "–",
                    f"{sum(filter(None, errors.values())) / len(errors):.4f}" if errors else "–",
                    "–" if worst is None else f"{errors[worst]:.4f}" + (f" in {worst}" if worst else ""),
                )
            )
    titles = ("kind", "pruned", "not", "shape", "kept", "mean error", "worst, in block")
    return table(titles, rows, (1, 2, 3, 4, 5, 6))
