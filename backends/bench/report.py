"""``sparsify bench`` on a terminal, as JSON and as a picture."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.padding import PaddingDimensions
from rich.table import Table
from rich.text import Text

from sparsify.backends.bench.benchmark import Benchmark, SiteSpeed
from sparsify.files.manifest import to_json
from sparsify.files.single import put_file
from sparsify.words import format_bytes, plain


def benchmark_report(result: Benchmark) -> RenderableType:
    """Two tables: the model as a whole, and the layers of a packed one by kind."""
    whole = Table(
        title=plain(f"{result.folder} against {result.against}"), title_justify="left", caption_justify="left"
    )
    against, out = map(plain, result.columns)
    for column in ("", against, out, f"{out} to {against}"):
        whole.add_column(column, justify="left" if not column else "right")
    first = f"prefill of {result.prompt}, tokens/s" if result.prompt else "pictures/s, one at a time"
    speeds = [(first, result.prefill)]
    speeds.append((f"decode of {result.tokens}, tokens/s", result.decode))
    for label, speed in speeds:
        if speed is not None:
            ratio = f"{speed.ratio:.2f}× ({speed.low:.2f} … {speed.high:.2f})"
            whole.add_row(label, f"{speed.against:.1f}", f"{speed.out:.1f}", ratio)
    before, after = result.file_bytes
    whole.add_row("weight files", _size(before), _size(after), f"{after / before:.3f}×")
    if result.loading is not None:
        a, b = result.loading
        whole.add_row("loading, s", f"{a.seconds:.2f}", f"{b.seconds:.2f}", f"{b.seconds / a.seconds:.2f}×")
        whole.add_row(
            "until the first token, s" if result.prompt else "until the first output, s",
            f"{a.first:.2f}",
            f"{b.first:.2f}",
            f"{b.first / a.first:.2f}×",
        )
        whole.add_row("memory added until then", _size(a.added), _size(b.added), f"{b.added / a.added:.2f}×")
    if result.device != "cpu" and result.memory is not None:
        a_bytes, b_bytes = result.memory
        whole.add_row("weights on the GPU", _size(a_bytes), _size(b_bytes), f"{b_bytes / a_bytes:.3f}×")
    whole.caption = f"{result.machine}, {result.dtype}, medians of {result.rounds} rounds"
    parts: list[RenderableType] = [whole]
    if result.sites:
        parts.append(_sites(result))
    if result.device != "cpu" and result.kinds[1] == "packed":
        parts.append(_products(result))
    if result.peers or result.no_peers:
        parts.append(_peers(result))
    if result.same_tokens is not None:
        parts.append(
            Text("both generate the same tokens")
            if result.same_tokens
            else Text("they generate other tokens: another model, or sums that differ in their last bits", "yellow")
        )
    return Group(*parts)


def _size(count: int) -> str:
    """In digits by which two can be compared."""
    return f"{count / (1 << 20):.2f} MiB" if 1 << 19 <= count < 100 << 20 else format_bytes(count)


def _table(title: str, padding: PaddingDimensions) -> Table:
    """No lines between columns: it is to fit a terminal of 80."""
    return Table(
        title=title,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE,
        pad_edge=False,
        padding=padding,
    )


def _sites(result: Benchmark) -> Table:
    table = _table("one token through one layer", padding=(0, 1))
    table.add_column("layer", overflow="fold")
    table.add_column("out × in", no_wrap=True)
    # Figures have room at 80 columns, whatever runs.
    table.add_column("runs", overflow="fold")
    for column in ("torch", "dense", "packed", "gain"):
        table.add_column(column, justify="right", no_wrap=True)
    for site in result.sites:
        name = f"{site.kind} ×{site.count}" if site.count > 1 else site.kind
        table.add_row(name, "×".join(map(str, site.shape)), site.runs, *_times(site))
    table.caption = "µs, weights from memory: by F.linear, by our dense kernel, packed; gain of what runs over F.linear"
    return table


def _peers(result: Benchmark) -> RenderableType:
    """OUT by each peer: decode and prefill by the clock, and what ``OUT`` gains by processor time."""
    table = _table("against other runtimes, one after the other", padding=(0, 1))
    table.add_column("", overflow="fold")
    table.add_column("file", justify="right", no_wrap=True)
    for column in ("decode", "gain", "CPU", "prefill", "gain", "CPU"):
        table.add_column(column, justify="right", no_wrap=True)
    for peer in result.peers:
        figures = [_size(peer.nbytes)]
        for clock, cpu in ((peer.decode, peer.decode_cpu), (peer.prefill, peer.prefill_cpu)):
            figures += [f"{clock.against:.1f}", f"{clock.ratio:.2f}×", f"{cpu.ratio:.2f}×"]
        table.add_row(peer.name, *figures)
    versions = ", ".join(dict.fromkeys(peer.version for peer in result.peers))
    table.caption = f"its tokens/s, then {plain(result.columns[1])} to it by the clock and by CPU time; {versions}"
    notes = [Text(f"{one.node} is left out: {plain(one.reason)}", "yellow") for one in result.no_peers]
    return Group(table, *notes)


# Token counts that the table of a GPU has room for.
_COUNTS = (1, 8, 16, 64, 256, 2048)


def _products(result: Benchmark) -> Table:
    """One row for every kind of product on a GPU: what it gains over cuBLAS."""
    table = _table("products by number of tokens", padding=(0, 1, 0, 0))
    table.add_column("layers", overflow="fold")
    table.add_column("out × in", no_wrap=True)
    for count in _COUNTS:
        table.add_column(str(count), justify="right", no_wrap=True)
    for (label, shape), (count, product) in result.products_by_kind().items():
        gains = [f"{product.gains[t]:.2f}×" if t in product.gains else "–" for t in _COUNTS]
        table.add_row(f"{label} ×{count}", shape, *(gains if product.plan is not None else ["dense"] * len(_COUNTS)))
    measured = any(p.gains for p in result.products)
    table.caption = (
        "times faster than cuBLAS, weights from memory, by CUDA graphs"
        if measured
        else "nothing was measured (--no-tune, or the folder says so): built-in defaults chose the kernels"
    )
    return table


def _times(site: SiteSpeed) -> tuple[str, ...]:
    t = site.timing
    if t is None or site.seconds is None:
        return ("–", "–", "–", "–")
    packed = "–" if t.packed is None else f"{t.packed * 1e6:.0f}"
    return f"{t.torch * 1e6:.0f}", f"{t.dense * 1e6:.0f}", packed, f"{t.torch / site.seconds:.2f}×"


def write_report(result: Benchmark, folder: Path) -> None:
    """``bench.json`` and ``bench.png`` into ``folder``."""
    from sparsify.backends.bench.picture import draw_benchmark

    for name, content in (("bench.json", to_json(result.as_dict())), ("bench.png", draw_benchmark(result))):
        put_file(folder / name, content)
