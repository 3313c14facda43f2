"""The picture of a sensitivity: kinds by layers, darker where pruning costs more."""

from __future__ import annotations

from pathlib import Path

from sparsify.searching.costs import MEANING, Sensitivity

# Cells whose numbers are legible.
_LEGIBLE = 160


def draw(result: Sensitivity, path: Path) -> None:
    """Write the picture to ``path``; the suffix chooses the format."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    kinds, blocks = list(dict.fromkeys(c.kind for c in result.costs)), list(result.blocks)
    values = np.full((len(kinds), len(blocks)), np.nan)
    for cost in result.costs:
        values[kinds.index(cost.kind), blocks.index(cost.block)] = cost.loss
    width = min(24.0, max(7.0, 3.5 + 0.55 * len(blocks)))
    figure = Figure(figsize=(width, 2.4 + 0.5 * len(kinds)), layout="constrained")
    (FigureCanvasSVG if path.suffix == ".svg" else FigureCanvasAgg)(figure)
    axes = figure.subplots()
    axes.set_facecolor("#DDDDDD")  # a block that has none of the kind
    top = max(float(np.nanmax(values)), 1e-12)
    image = axes.imshow(values, aspect="auto", cmap="cividis_r", vmin=0, vmax=top)
    axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
    step = -(-len(blocks) // 40)
    axes.set_xticks(range(0, len(blocks), step), [_short(block) for block in blocks[::step]], fontsize=8)
    axes.set_xlabel("block", fontsize=8)
    if values.size <= _LEGIBLE:
        for row, column in np.argwhere(~np.isnan(values)):
            value = values[row, column]
            ink = "white" if value > 0.6 * top else "black"
            axes.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=7, color=ink)
    figure.colorbar(image, ax=axes, label="nats a token, lower is better", pad=0.02)
    title = f"{result.model}: what {result.spec} costs where it prunes one kind in one block alone"
    figure.suptitle(f"{title}\n{MEANING[result.measure]}", fontsize=9)
    figure.savefig(path, dpi=120)


def _short(block: str) -> str:
    """``3`` of ``model.layers.3``."""
    return block.rpartition(".")[2]
