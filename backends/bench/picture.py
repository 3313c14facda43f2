"""``sparsify bench`` as a picture."""

from __future__ import annotations

import io

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsify.backends.bench.benchmark import Benchmark, SiteSpeed

_SPEED, _COST = "#0072B2", "#E69F00"


def draw_benchmark(result: Benchmark) -> bytes:
    """A PNG: ratios of the whole model on the left; on the right times of its layers, or on a GPU gains by number of
    tokens.
    """
    sites = [s for s in result.sites if s.timing is not None]
    # Beside the model as a whole stands what only packed folders have.
    both = bool(sites) or result.device != "cpu"
    figure = Figure(figsize=(11 if both else 6, 2.2 + 0.42 * max(4, len(sites))), layout="constrained")
    left, *right = figure.subplots(1, 2, width_ratios=(1, 2)) if both else (figure.subplots(),)
    speeds: dict[str, float] = {}
    if result.prefill is not None:
        speeds["prefill, tokens/s" if result.prompt else "pictures/s"] = result.prefill.ratio
    if result.decode is not None:
        speeds["decode, tokens/s"] = result.decode.ratio
    costs = {"size of the files": result.file_bytes[1] / result.file_bytes[0]}
    if result.device != "cpu" and result.memory is not None:
        costs["memory of weights"] = result.memory[1] / result.memory[0]
    if result.loading is not None:
        costs["time to first token" if result.prompt else "time to first output"] = (
            result.loading[1].first / result.loading[0].first
        )
        costs["memory of the process"] = result.loading[1].added / result.loading[0].added
    # More is better of one kind and worse of the other: never in one colour.
    for bars, colour, better in ((speeds, _SPEED, "higher is better"), (costs, _COST, "lower is better")):
        left.barh(list(bars), list(bars.values()), color=colour, label=better)
        for place, value in enumerate(bars.values(), 0 if bars is speeds else len(speeds)):
            label = left.text(value, place, f" {value:.2f}×", va="center")
            # The line at 1 does not go through it.
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    left.axvline(1, color="#444444", linewidth=1)
    left.invert_yaxis()
    left.set_title("{1}, times {0}".format(*result.columns), loc="left")
    left.set_xlim(0, max(1.2, *speeds.values(), *costs.values()) * 1.25)
    left.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=2)
    for axes in right:
        if result.device == "cpu":
            _draw_layers(axes, sites)
        else:
            _draw_products(axes, result)
    for axes in (left, *right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{result.machine}, {result.dtype}", fontsize=9, x=0.01, ha="left")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    return picture.getvalue()


def _draw_layers(axes: Axes, sites: list[SiteSpeed]) -> None:
    labels = [f"{s.kind} {'×'.join(map(str, s.shape))}" for s in sites]
    places = range(len(sites))
    stock = [s.timing.torch * 1e6 for s in sites if s.timing]
    axes.barh([p - 0.2 for p in places], stock, 0.4, color="#b9b9b9", label="F.linear")
    runs = [s.seconds * 1e6 for s in sites if s.seconds is not None]
    axes.barh([p + 0.2 for p in places], runs, 0.4, color="#3b6ea5", label="what runs")
    axes.set_yticks(list(places), [f"{label}\n{s.runs}" for label, s in zip(labels, sites, strict=True)], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("microseconds for one token, lower is better")
    axes.set_title("layers", loc="left")
    axes.legend(frameon=False)


def _draw_products(axes: Axes, result: Benchmark) -> None:
    for (label, shape), (_, product) in result.products_by_kind().items():
        if product.gains:
            axes.plot(list(product.gains), list(product.gains.values()), marker="o", label=f"{label} {shape}")
    axes.axhline(1, color="#444444", linewidth=1)
    axes.set_xlabel("tokens")
    axes.set_title("times faster than cuBLAS, higher is better", loc="left")
    if any(p.gains for p in result.products):
        axes.set_xscale("log", base=2)
        axes.legend(frameon=False, fontsize=8)
    else:
        axes.text(0.5, 0.5, "nothing was measured", ha="center", transform=axes.transAxes)
