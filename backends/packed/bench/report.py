"""``sparsify bench`` on a terminal, as JSON and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sparsify.words import format_bytes

if TYPE_CHECKING:
    from sparsify.backends.packed.bench.benchmark import Benchmark, SiteSpeed
    from sparsify.backends.packed.loaded.prepare import Prepared


def benchmark_report(result: Benchmark) -> RenderableType:
    """Two tables: the model as a whole, and its layers by kind."""
    whole = Table(title=f"{result.folder} against {result.against}", title_justify="left", caption_justify="left")
    for column in ("", "dense", "packed", "packed to dense"):
        whole.add_column(column, justify="left" if not column else "right")
    speeds = [(f"prefill of {result.prompt}, tokens/s", result.prefill)]
    if result.decode is not None:
        speeds.append((f"decode of {result.tokens}, tokens/s", result.decode))
    for label, speed in speeds:
        ratio = f"{speed.ratio:.2f}× ({speed.low:.2f} … {speed.high:.2f})"
        whole.add_row(label, f"{speed.dense:.1f}", f"{speed.packed:.1f}", ratio)
    dense, packed = result.file_bytes
    whole.add_row("weight files", format_bytes(dense), format_bytes(packed), f"{packed / dense:.3f}×")
    if result.loading is not None:
        a, b = result.loading
        whole.add_row("loading, s", f"{a.seconds:.2f}", f"{b.seconds:.2f}", f"{b.seconds / a.seconds:.2f}×")
        whole.add_row("until the first token, s", f"{a.first:.2f}", f"{b.first:.2f}", f"{b.first / a.first:.2f}×")
        whole.add_row(
            "memory added until then", format_bytes(a.added), format_bytes(b.added), f"{b.added / a.added:.2f}×"
        )
    if result.device != "cpu" and result.memory is not None:
        a_bytes, b_bytes = result.memory
        whole.add_row("weights on the GPU", format_bytes(a_bytes), format_bytes(b_bytes), f"{b_bytes / a_bytes:.3f}×")
    whole.caption = f"{machine(result)}, {result.dtype}, medians of {result.rounds} rounds"
    parts: list[RenderableType] = [whole, _sites(result) if result.device == "cpu" else _products(result)]
    if result.same_tokens is not None:
        parts.append(
            Text("both generate the same tokens")
            if result.same_tokens
            else Text("they generate other tokens: another model, or sums that differ in their last bits", "yellow")
        )
    return Group(*parts)


def _sites(result: Benchmark) -> Table:
    # No lines between columns: it is to fit a terminal of 80.
    table = Table(title="one token through one layer", title_justify="left", caption_justify="left",
                  box=box.SIMPLE, pad_edge=False)  # fmt: skip
    for column in ("layer", "out × in", "runs"):
        table.add_column(column, no_wrap=True)
    for column in ("torch", "dense", "packed", "gain"):
        table.add_column(column, justify="right", no_wrap=True)
    for site in result.sites:
        name = f"{site.kind} ×{site.count}" if site.count > 1 else site.kind
        table.add_row(name, "×".join(map(str, site.shape)), _runs(site), *_times(site))
    table.caption = "µs, weights from memory: by F.linear, by our dense kernel, packed; gain of what runs over F.linear"
    return table


def machine(result: Benchmark) -> str:
    return f"{result.processor}, {result.threads} threads" if result.device == "cpu" else result.processor


# Token counts that the table of a GPU has room for.
_COUNTS = (1, 8, 16, 64, 256, 2048)


def _products(result: Benchmark) -> Table:
    """One row for every kind of product on a GPU: what it gains over cuBLAS."""
    table = Table(title="products by number of tokens", title_justify="left", caption_justify="left",
                  box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))  # fmt: skip
    table.add_column("layers", overflow="fold")
    table.add_column("out × in", no_wrap=True)
    for count in _COUNTS:
        table.add_column(str(count), justify="right", no_wrap=True)
    for (label, shape), (count, product) in products_by_kind(result).items():
        gains = [f"{product.gains[t]:.2f}×" if t in product.gains else "–" for t in _COUNTS]
        table.add_row(f"{label} ×{count}", shape, *(gains if product.plan is not None else ["dense"] * len(_COUNTS)))
    measured = any(p.gains for p in result.products)
    table.caption = "times faster than cuBLAS, weights from memory, by CUDA graphs" if measured else (
        "nothing was measured (--no-tune, or the folder says so): built-in defaults chose the kernels")  # fmt: skip
    return table


def products_by_kind(result: Benchmark) -> dict[tuple[str, str], tuple[int, Prepared]]:
    """(layers, shape) -> how many there are, and one of them."""
    found: dict[tuple[str, str], tuple[int, Prepared]] = {}
    for product in result.products:
        key = siblings_label(product.names), "×".join(map(str, product.shape))
        found[key] = found.get(key, (0, product))[0] + 1, product
    return found


def _runs(site: SiteSpeed) -> str:
    return site.layout if site.layout != "dense" else f"dense, {site.kernel}"


def _times(site: SiteSpeed) -> tuple[str, ...]:
    t = site.timing
    if t is None:
        return ("–", "–", "–", "–")
    runs = t.packed if t.packed is not None else (t.torch if site.kernel == "torch" else t.dense)
    packed = "–" if t.packed is None else f"{t.packed * 1e6:.0f}"
    return f"{t.torch * 1e6:.0f}", f"{t.dense * 1e6:.0f}", packed, f"{t.torch / runs:.2f}×"


def kind_of(name: str) -> str:
    """What a layer is called in every block: ``self_attn.q_proj``."""
    parts = name.removesuffix(".weight").split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[last + 1 :])


def siblings_label(names: Sequence[str]) -> str:
    """What layers of one product are called together: ``self_attn.q/k/v_proj``."""
    kinds = [kind_of(name) for name in names]
    parents, leaves = {kind.rpartition(".")[0] for kind in kinds}, [kind.rpartition(".")[2] for kind in kinds]
    ends = {leaf.rpartition("_")[2] for leaf in leaves}
    if len(kinds) == 1 or len(parents) > 1:
        return " + ".join(kinds)
    end = f"_{ends.pop()}" if len(ends) == 1 and all("_" in leaf for leaf in leaves) else ""
    parent = f"{parent}." if (parent := parents.pop()) else ""
    return parent + "/".join(leaf.removesuffix(end) for leaf in leaves) + end


def write_report(result: Benchmark, folder: Path) -> None:
    """``bench.json`` and ``bench.png`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(result.as_dict(), indent=2) + "\n", encoding="utf-8")
    draw(result, folder / "bench.png")


def draw(result: Benchmark, path: Path) -> None:
    """Ratios of the whole model on the left; on the right times of its layers, or on a GPU gains by number of
    tokens.
    """
    from matplotlib.figure import Figure

    sites = [s for s in result.sites if s.timing is not None]
    figure = Figure(figsize=(11, 2.2 + 0.42 * max(4, len(sites))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 2))
    bars = {"prefill": result.prefill.ratio}
    if result.decode is not None:
        bars["decode"] = result.decode.ratio
    bars["size"] = result.file_bytes[1] / result.file_bytes[0]
    if result.device != "cpu" and result.memory is not None:
        bars["memory"] = result.memory[1] / result.memory[0]
    if result.loading is not None:
        bars["first token"] = result.loading[1].first / result.loading[0].first
        bars["memory"] = result.loading[1].added / result.loading[0].added
    left.barh(list(bars), list(bars.values()), color="#3b6ea5")
    left.axvline(1, color="#444444", linewidth=1)
    left.invert_yaxis()
    left.set_title("packed to dense", loc="left")
    for i, value in enumerate(bars.values()):
        left.text(value, i, f" {value:.2f}×", va="center")
    left.set_xlim(0, max(1.2, *bars.values()) * 1.25)
    if result.device == "cpu":
        _draw_layers(right, sites)
    else:
        _draw_products(right, result)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{machine(result)}, {result.dtype}", fontsize=9, x=0.01, ha="left")
    figure.savefig(path, dpi=120)


def _draw_layers(axes: Any, sites: list[SiteSpeed]) -> None:
    labels = [f"{s.kind} {'×'.join(map(str, s.shape))}" for s in sites]
    places = range(len(sites))
    stock = [s.timing.torch * 1e6 for s in sites if s.timing]
    axes.barh([p - 0.2 for p in places], stock, 0.4, color="#b9b9b9", label="F.linear")
    runs = [float(_runs_seconds(s)) * 1e6 for s in sites]
    axes.barh([p + 0.2 for p in places], runs, 0.4, color="#3b6ea5", label="what runs")
    axes.set_yticks(list(places), [f"{label}\n{_runs(s)}" for label, s in zip(labels, sites, strict=True)], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("microseconds for one token")
    axes.set_title("layers", loc="left")
    axes.legend(frameon=False)


def _draw_products(axes: Any, result: Benchmark) -> None:
    for (label, shape), (_, product) in products_by_kind(result).items():
        if product.gains:
            axes.plot(list(product.gains), list(product.gains.values()), marker="o", label=f"{label} {shape}")
    axes.axhline(1, color="#444444", linewidth=1)
    axes.set_xlabel("tokens")
    axes.set_title("times faster than cuBLAS", loc="left")
    if any(p.gains for p in result.products):
        axes.set_xscale("log", base=2)
        axes.legend(frameon=False, fontsize=8)
    else:
        axes.text(0.5, 0.5, "nothing was measured", ha="center", transform=axes.transAxes)


def _runs_seconds(site: SiteSpeed) -> float:
    t = site.timing
    assert t is not None, "only timed layers are drawn"
    if t.packed is not None:
        return t.packed
    return t.torch if site.kernel == "torch" else t.dense
