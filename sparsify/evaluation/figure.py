"""The picture of a comparison: perplexity, layer errors, time and memory of each pass, with matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsify.evaluation.comparison import Compared, ComparedPass

# Okabe and Ito's colours, told apart by all eyes; past eight passes they come again with another line.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#999999", "#B8A800")
_LINES = ("-", "--", ":", "-.")


def draw(comparison: Compared, path: Path) -> None:
    """Write the picture to ``path``; the suffix chooses the format."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    rows = comparison.rows[1:]
    panels = _panels(comparison)
    across = 3
    down = -(-len(panels) // across)
    bars = max(1.6, 0.9 + 0.3 * len(rows))
    figure = Figure(figsize=(13, 1.2 + bars + 2.5 * down), layout="constrained")
    (FigureCanvasSVG if path.suffix == ".svg" else FigureCanvasAgg)(figure)
    grid = figure.subplots(1 + down, across, squeeze=False, height_ratios=[bars, *[2.5] * down])
    title = f"{comparison.model}, schedule {comparison.schedule}\ncalibration: {comparison.calibration}"
    figure.suptitle(title + (f"\nperplexity: {comparison.data}" if comparison.data else ""), fontsize=10)
    dense = comparison.rows[0].perplexity
    _bars(grid[0][0], rows, [row.perplexity for row in rows], "perplexity (lower is better)", "{:.2f}", dense)
    _bars(grid[0][1], rows, [row.seconds for row in rows], "seconds to trace, calibrate, prune, write", "{:.1f}")
    memory = [None if row.memory is None else row.memory / (1 << 20) for row in rows]
    _bars(grid[0][2], rows, memory, "peak memory, MiB", "{:.0f}")
    top = max((error for row in rows for error in row.errors.values()), default=0.0)
    for number, axes in enumerate(grid[1:].flat):
        if number < len(panels):
            kind, sites = panels[number]
            _errors(axes, rows, kind, sites, top)
        else:
            axes.set_axis_off()
    if panels:
        grid[1][0].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=120)


def _panels(comparison: Compared) -> list[tuple[str, list[tuple[str, str]]]]:
    """The sites of each kind that were measured, as (block, name), in the order of the model."""
    measured = {name for row in comparison.rows for name in row.errors}
    found: dict[str, list[tuple[str, str]]] = {}
    for name, (block, kind) in comparison.sites.items():
        if name in measured:
            found.setdefault(kind, []).append((block, name))
    return list(found.items())


def _bars(
    axes: Any, rows: list[ComparedPass], values: list[float | None], title: str, form: str, dense: float | None = None
) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
    axes.invert_yaxis()
    known = [v for v in values if v is not None]
    if not known:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes, color="#666666")
        axes.set_xticks([])
        return
    if max(known) > 20 * min(known) > 0:
        axes.set_xscale("log")
    bars = axes.barh(
        range(len(rows)), [v or 0 for v in values], color=[_COLOURS[i % len(_COLOURS)] for i in range(len(rows))]
    )
    axes.bar_label(bars, ["–" if v is None else form.format(v) for v in values], padding=3, fontsize=8)
    axes.margins(x=0.15)
    if dense is not None:
        axes.axvline(dense, color="black", linewidth=1, linestyle="--")
        axes.text(dense, -0.62, f" dense {dense:.2f}", fontsize=8, va="bottom", ha="left")
    axes.spines[["top", "right"]].set_visible(False)


def _errors(axes: Any, rows: list[ComparedPass], kind: str, sites: list[tuple[str, str]], top: float) -> None:
    """One kind of layer: the blocks from left to right, a line for each pass."""
    axes.set_title(kind.rpartition("*.")[2], fontsize=9)
    blocks = list(dict.fromkeys(block for block, _ in sites))
    for i, row in enumerate(rows):
        points = [(blocks.index(block), row.errors[name]) for block, name in sites if name in row.errors]
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            label=row.name,
            color=_COLOURS[i % len(_COLOURS)],
            linestyle=_LINES[i // len(_COLOURS) % len(_LINES)],
            marker=".",
            linewidth=1.2,
            markersize=5,
        )
    step = -(-len(blocks) // 16)
    axes.set_xticks(range(0, len(blocks), step), [block.rpartition(".")[2] for block in blocks[::step]], fontsize=7)
    axes.tick_params(axis="y", labelsize=7)
    axes.set_ylim(0, 1.08 * top or 1)
    axes.set_xlabel("block" if blocks != [""] else "", fontsize=8)
    axes.set_ylabel("relative error of its output\n(lower is better)", fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)
