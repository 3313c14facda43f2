"""The top of a page, and what the model is worth: quality, bytes and times, each of facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsify.provenance.figures import Figure
from sparsify.provenance.markdown import short
from sparsify.reporting.facts import Facts
from sparsify.reporting.markup import Markup, code, joined, section, table, tag
from sparsify.reporting.words import number, summary, times
from sparsify.words import format_bytes


def head(facts: Facts) -> Markup:
    """Whose page it is, the figures that matter most, and all of it in words."""
    specs = [str(own.get("spec")) for run in facts.history for own in run.get("passes", ())]
    specs += [str(run["command"]) for run in facts.history if run["command"] == "tune"]
    what = joined([code(short(" + ".join(specs))), " · " if specs else None, f"in {facts.folder.name}"])
    sentences = tag("ul", *(tag("li", line) for line in summary(facts)))
    title = tag("h1", short(facts.base))
    return tag("header", title, tag("p", what, class_="what"), _tiles(facts), sentences)


def _tiles(facts: Facts) -> Markup:
    tiles: list[tuple[str, str]] = []
    if (whole := facts.whole) is not None:
        tiles.append((f"{1 - whole['kept']:.1%}", "of the whole model's numbers are zero"))
    cuts = [own["parameters"] for run in facts.history for own in run.get("passes", ()) if "parameters" in own]
    if cuts and cuts[0][0]:
        tiles.append((f"{cuts[-1][1] / cuts[0][0]:.1%}", f"of its {cuts[0][0]:,} numbers are still there"))
    sites = {name: site for stack in facts.stacks for cell in stack.cells.values() for name, site in cell.sites.items()}
    if sites:
        many = "weight matrix" if len(sites) == 1 else "weight matrices"
        tiles.append((f"{len(sites):,}", f"{many} pruned{_by_the_last(facts)}"))
        errors = [site["error"] for site in sites.values() if site.get("error") is not None]
        if errors:
            when = ", before the training that followed" if facts.trained_since else ""
            tiles.append((f"{sum(errors) / len(errors):.3f}", f"mean relative error of their outputs{when}; 0 is best"))
    if facts.figures and (last := facts.figures[-1]).ratio is not None:
        step = f" step {last.step}" if last.step else ""
        tiles.append((times(last.ratio), f"the perplexity before{step}; less is better"))
    if facts.nbytes:
        tiles.append((format_bytes(facts.nbytes), "of weights on disk"))
    boxes = (tag("div", tag("b", big), tag("span", small), class_="tile") for big, small in tiles)
    return tag("div", *boxes, class_="tiles")


def _by_the_last(facts: Facts) -> str:
    steps = facts.pruning_steps
    return f" by step {steps[-1]}" if len(steps) > 1 else ""


def quality(facts: Facts) -> Markup:
    """Perplexities as bars, with their verdicts, and the scores of tasks."""
    parts = [part for figure in facts.figures for part in _perplexity(figure)]
    parts += [part for own in facts.measured for part in own.table()]
    if not parts:
        told = ["It was not measured when the folder was written. ", code("sparsify eval MODEL OUT --json > FILE")]
        told += [" with ", code("--data TEXT"), " or ", code("--tasks TASKS"), " measures both, and "]
        told += [code("sparsify report OUT --eval FILE"), " writes it here; ", code("sparsify compile … --eval TEXT")]
        told += [" does at once."]
        parts = [tag("p", *told)]
    return section("Quality", *parts)


def _perplexity(figure: Figure) -> list[Markup]:
    top = max(figure.before or 0, figure.after or 0) or 1
    bars = []
    for name, value in (("before", figure.before), ("after", figure.after)):
        bar = tag("i", style=f"--w:{(value or 0) / top:.1%}", class_=name)
        bars += [tag("span", name), tag("span", bar, class_="track"), tag("b", number(value))]
    said = figure.verdict or (f"{times(figure.ratio)} the perplexity before" if figure.ratio else "")
    said = f"{said[:1].upper()}{said[1:]}. " if said else ""
    if figure.standard_error is not None:
        said += f"Standard error of the ratio: {figure.standard_error:.2%}. "
    said += f"A lower perplexity is better ({figure.what})."
    title = f"Perplexity on {short(figure.data)}" if figure.data else "Perplexity"
    return [tag("h3", title), tag("div", *bars, class_="bars"), tag("p", said)]


def costs(facts: Facts) -> Markup:
    """Bytes and times, where the manifest has any."""
    rows: list[tuple[object, str]] = []
    if facts.nbytes:
        rows.append(("weights on disk", format_bytes(facts.nbytes)))
    quantized = facts.manifest.get("quantized_source")
    if isinstance(quantized, Mapping):
        for key, what in (
            ("stored_bytes", "the model that was read, as it was stored"),
            ("dense_bytes", "the same, dense"),
        ):
            if isinstance(quantized.get(key), int):
                rows.append((what, format_bytes(quantized[key])))
    if (seconds := facts.manifest.get("tuned", {}).get("seconds")) is not None:
        rows.append(("training", f"{seconds:,.1f} s"))
    shared = facts.manifest.get("processes", {})
    if "bytes" in shared:
        rows.append((f"sent by {shared.get('count', 'several')} processes", format_bytes(shared["bytes"])))
    if "tokens_per_second" in shared:
        rows.append(("tokens a second, by all processes", f"{shared['tokens_per_second']:,.0f}"))
    parts: list[object] = [table(("what", "how much"), rows, (1,))] if rows else []
    packed = _packed(facts.manifest.get("packed", {}).get("sites", ()))
    return section("Time and memory", *parts, *_loads(shared.get("ranks", ())), *packed)


def _loads(ranks: Sequence[Mapping[str, Any]]) -> list[object]:
    """What each of several processes had to do."""
    if not ranks:
        return []
    rows = [
        (str(n), *(f"{own.get(what, 0):,.1f} s" for what in ("worked", "waited")), format_bytes(own.get("sent", 0)))
        for n, own in enumerate(ranks)
    ]
    titles = ("process", "worked", "waited for others", "sent")
    return [tag("h3", "Processes"), table(titles, rows, (1, 2, 3))]


def _packed(sites: Sequence[Mapping[str, Any]]) -> list[object]:
    """What packing saves, in bytes and in the time of a product."""
    if not sites:
        return []
    layouts: dict[str, list[Mapping[str, Any]]] = {}
    for site in sites:
        few = f" int{site['bits']}" if site.get("bits") else ""
        layouts.setdefault(f"{site.get('layout', '')}{few}", []).append(site)
    rows = []
    for layout, own in layouts.items():
        timings = [timing for site in own if (timing := site.get("timing"))]
        dense, packed = (
            sum(t[key] for t in timings if isinstance(t.get(key), (int, float))) for key in ("dense_us", "packed_us")
        )
        times_of = [f"{dense:,.0f} µs", f"{packed:,.0f} µs"] if dense and packed and layout != "dense" else ["–", "–"]
        sizes = [format_bytes(sum(site.get(key, 0) for site in own)) for key in ("dense_bytes", "bytes")]
        rows.append((code(layout), str(len(own)), *sizes, *times_of))
    titles = ("layout", "weights", "dense", "as stored", "products, dense", "products, packed")
    said = "Times are sums over the weights of a layout, each timed on the machine that packed them."
    return [tag("h3", "Packing"), tag("p", said), table(titles, rows, (1, 2, 3, 4, 5))]
