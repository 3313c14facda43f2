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
    height = 3.4 + 0.42 * len(rows)
    figure = Figure(figsize=(12, 2 * max(3.2, height / 1.6)), layout="constrained")
    (FigureCanvasSVG if path.suffix == ".svg" else FigureCanvasAgg)(figure)
    grid = figure.subplots(2, 2)
    title = f"{comparison.model}, schedule {comparison.schedule}\ncalibration: {comparison.calibration}"
    figure.suptitle(title + (f"\nperplexity: {comparison.data}" if comparison.data else ""), fontsize=10)
    dense = comparison.rows[0].perplexity
    _bars(grid[0][0], rows, [row.perplexity for row in rows], "perplexity, lower is better", "{:.2f}", dense)
    _errors(grid[0][1], rows)
    _bars(grid[1][0], rows, [row.seconds for row in rows], "seconds: trace, calibrate, prune, write", "{:.1f}")
    memory = [None if row.memory is None else row.memory / (1 << 20) for row in rows]
    _bars(grid[1][1], rows, memory, "peak memory, MiB", "{:.0f}")
    figure.savefig(path, dpi=120)


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


def _errors(axes: Any, rows: list[ComparedPass]) -> None:
    axes.set_title("output of each site against the dense model's, relative error", fontsize=10)
    drawn = False
    for i, row in enumerate(rows):
        if row.errors:
            line = _LINES[i // len(_COLOURS) % len(_LINES)]
            axes.plot(
                list(row.errors.values()),
                label=row.name,
                color=_COLOURS[i % len(_COLOURS)],
                linestyle=line,
                marker=".",
                linewidth=1.2,
                markersize=4,
            )
            drawn = True
    axes.set_ylim(bottom=0)
    axes.set_xlabel("site, in the order of the model", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    if drawn:
        axes.legend(fontsize=7, frameon=False)
