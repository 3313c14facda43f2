"""What a person reads: tables of what will be pruned, of what was, and of a model's sites. Built with rich."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sparsify.cli.evaluating.tables import score_report
from sparsify.compiler.runs import zeros_of
from sparsify.host import peak_memory
from sparsify.method.pattern import Grid, Pattern
from sparsify.method.spec import spec_text
from sparsify.quality.evaluation import figure
from sparsify.structure.plan import count_parameters
from sparsify.words import format_bytes, plain

if TYPE_CHECKING:
    from sparsify.analysis.linear import LinearSite, Opaque
    from sparsify.compiler.result import Compiled
    from sparsify.compiler.runs import PassRun
    from sparsify.context import SiteResult
    from sparsify.errors import Refused
    from sparsify.evaluation.comparison import Compared
    from sparsify.prune.targets import Target
    from sparsify.quality.evaluation import Evaluation
    from sparsify.quality.verdict import Paired

# Verdicts that ask for something are seen at once.
_STYLES = {"clearly": "yellow", "much": "bold red", "far": "bold red", "no number": "bold red"}
OTHER_WINDOWS = "its windows hold other tokens (another tokenizer or length), so that no pairs can be compared"


def result_report(compiled: Compiled, seconds: float) -> RenderableType:
    """After a compile: per pass a table by kind of site, then what stayed dense, then the totals."""
    parts: list[RenderableType] = []
    for done in compiled.structure:
        parts += [Text(spec_text(done.structural_pass), "bold"), *map(Text, done.lines())]
    parameters = count_parameters(compiled.source)
    for number, run in enumerate(compiled.runs, 1):
        if run.regions:
            parts += _region_report(run)
            continue
        if run.channels:
            parts += [_channel_report(run), *_skipped_lines(run.skipped, "left in their order")]
            continue
        if not run.sites:
            weights = f"{len(run.written)} weights written" if run.written else "no weight written"
            parts.append(Text(f"{spec_text(run.applied)}: {weights}, {run.seconds:.1f} s"))
            continue
        kept = 1 - zeros_of(compiled.runs[:number]) / max(1, parameters)
        left = _skipped_lines(run.skipped, "left as it was" if run.rounds else "left dense")
        parts += [_result_table(run, parameters, kept), *left]
        unseen = [(s.name, s.without_data) for s in run.sites if s.without_data]
        for name, experts in unseen:
            numbers = ", ".join(map(str, experts))
            parts.append(Text(f"pruned by magnitude, for no token reached them: {name} experts {numbers}", "yellow"))
        notes: dict[str, list[str]] = {}
        for site in run.sites:
            for note in site.notes:
                notes.setdefault(note, []).append(site.name)
        parts += [Text(f"{_some(names)}: {note}", "yellow") for note, names in notes.items()]
    parts += _opaque_lines(compiled.opaque)
    if (judged := compiled.evaluation) is not None:
        names = ("before", "after")
        parts.append(_perplexities(list(zip(names, (judged.dense, judged.pruned), strict=True)), [judged.paired]))
        parts.append(Text(judged.verdict, _STYLES.get(judged.paired.level, "")))
    parts += _processes(compiled.manifest.get("processes", {}))
    parts.append(Text(f"{seconds:.1f} s in all, peak memory {format_bytes(peak_memory())}"))
    return Group(*parts)


def _processes(said: Mapping[str, Any]) -> list[Text]:
    """What each of several processes had to do, and all together."""
    ranks = said.get("ranks", ())
    if not ranks:
        return []
    worked, waited = (", ".join(f"{own[what]:.1f}" for own in ranks) for what in ("worked", "waited"))
    speed = f"; {said['tokens_per_second']:,.0f} tokens/s in all" if "tokens_per_second" in said else ""
    sent = format_bytes(said["bytes"])
    return [Text(f"{said['count']} processes worked {worked} s, waited {waited} s, and sent {sent}{speed}")]


def plan_report(compiled: Compiled) -> RenderableType:
    """For a dry run: what each pass would prune, to what, and what stays dense and why."""
    parts: list[RenderableType] = []
    for done in compiled.structure:
        parts += [Text(f"{spec_text(done.structural_pass)} would leave", "bold"), *map(Text, done.lines())]
    for run in compiled.runs:
        verb = "round" if run.rounds else "prune"
        if run.lanes:
            names = [lanes.name for lanes in run.lanes]
            parts.append(Text(f"{spec_text(run.applied)} would reorder what {_some(names)} read"))
            parts += _skipped_lines(run.skipped, "left in their order")
            continue
        if run.pattern is not None and not run.targets:
            parts.append(Text(f"{spec_text(run.applied)} would then {verb} the smaller model, once it is there"))
            continue
        if run.pattern is None:
            what = "train one block after the other" if run.applied.kind == "regions" else "see the graph as a whole"
            parts.append(Text(f"{spec_text(run.applied)} would {what}"))
            continue
        table = Table(title=f"{spec_text(run.applied)} would {verb}", title_justify="left")
        for column in ("site", "sites", "out × in", "to"):
            table.add_column(column, justify="left" if column in ("site", "to") else "right")
        for kind, targets in _by_kind(run.targets).items():
            shapes = sorted({_shape(t.site) for t in targets})
            table.add_row(kind, str(len(targets)), ", ".join(shapes), _zeros(run.pattern))
        total, pruned = (
            count_parameters(compiled.source),
            sum(t.site.experts * math.prod(t.site.shape) for t in run.targets),
        )
        table.add_section()
        table.add_row("all", str(len(run.targets)), f"{pruned:,}", "")
        zeros = ""
        if not isinstance(run.pattern, Grid):
            zeros = f"{float(run.pattern.sparsity) * pruned / max(1, total):.1%} zeros"
        table.add_row("whole model", "", f"{total:,}", zeros)
        parts += [table, *_skipped_lines(run.skipped, "left as it was" if run.rounds else "left dense")]
    return Group(*parts, *_opaque_lines(compiled.opaque), Text("dry run: nothing was read, pruned or written"))


def evaluation_report(results: Sequence[tuple[str, Evaluation]]) -> RenderableType:
    """Perplexities and scores side by side, each against the first, and what is to be thought of the others."""
    parts: list[RenderableType] = []
    if read := [(name, result) for name, result in results if result.windows]:
        against = pairs(read)
        parts.append(_perplexities(read, against))
        for (name, _), paired in zip(read[1:], against, strict=True):
            said = OTHER_WINDOWS if paired is None else paired.verdict
            parts.append(Text(plain(f"{name}: {said}"), "" if paired is None else _STYLES.get(paired.level, "")))
    return Group(*parts, *score_report(results))


def pairs(results: Sequence[tuple[str, Evaluation]]) -> list[Paired | None]:
    """The second and every later one against the first; None where their windows are others."""
    (name, first), *others = results
    base = f"the perplexity of {name}"
    return [other.against(first, base) if other.sha256 == first.sha256 else None for _, other in others]


def _perplexities(results: Sequence[tuple[str, Evaluation]], against: Sequence[Paired | None]) -> Table:
    """Perplexities on the same windows; ``against``: of all but the first."""
    first = results[0][1]
    table = Table(title=f"perplexity on {first.size}", title_justify="left")
    table.add_column("model", overflow="fold")
    for column in ("perplexity", "against the first", "standard error", "time"):
        table.add_column(column, justify="right")
    for (name, result), paired in zip(results, [None, *against], strict=True):
        error = "–" if paired is None or paired.standard_error is None else f"{paired.standard_error:.2%}"
        ratio = result.perplexity / first.perplexity
        against_first = f"{ratio:.3f}×" if math.isfinite(ratio) else "–"
        table.add_row(name, figure(result.perplexity), against_first, error, f"{result.seconds:.1f} s")
    return table


def comparison_report(comparison: Compared) -> RenderableType:
    """One line per pass: perplexity, error, time, memory."""
    table = Table(title=f"{comparison.model}, schedule {comparison.schedule}", title_justify="left")
    table.add_column("pass", overflow="fold")
    for column in ("perplexity", "error", "kept", "time", "peak memory"):
        table.add_column(column, justify="right")
    for row in comparison.rows:
        table.add_row(
            row.name,
            "–" if row.perplexity is None else f"{row.perplexity:.3f}",
            "–" if row.error is None else f"{row.error:.4f}",
            f"{row.kept:.2%}",
            f"{row.seconds:.1f} s" if row.errors or row.seconds else "–",
            "–" if row.memory is None else format_bytes(row.memory),
        )
    table.caption = "Errors are of outputs against the dense model's, ‖X₀Wᵀ−XŴᵀ‖/‖X₀Wᵀ‖, mean over sites."
    table.caption_justify = "left"
    lines: list[RenderableType] = [table, Text(f"calibration: {comparison.calibration}")]
    if comparison.data is not None:
        lines.append(Text(f"perplexity: {comparison.data}"))
    notes = [f"{row.name}: {note}" for row in comparison.rows for note in row.notes]
    return Group(*lines, *(Text(note, "yellow") for note in notes))


def _result_table(run: PassRun, parameters: int, kept: float) -> Table:
    """The sites of a pass by their kinds; ``kept`` of all ``parameters`` of the model, as it was left."""
    table = Table(
        title=f"{spec_text(run.applied)}, schedule {run.schedule}",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("site", overflow="fold")
    for column in ("sites", "out × in", "kept", "error", "worst", "time"):
        table.add_column(column, justify="right", overflow="fold")
    kinds: dict[str, list[SiteResult]] = {}
    for site in run.sites:
        kinds.setdefault(site.kind, []).append(site)
    prefix = shared_prefix(kinds)
    for kind, sites in kinds.items():
        shapes = sorted({"×".join(map(str, s.shape)) for s in sites})
        table.add_row(kind.removeprefix(prefix), str(len(sites)), ", ".join(shapes), *_figures(sites))
    table.add_section()
    table.add_row("all", str(len(run.sites)), "", f"{run.kept:.2%}", *_figures(run.sites)[1:])
    table.add_row("whole model", "", f"{parameters:,}", f"{kept:.2%}", "", "", "")
    twin = "cross_gram" in run.applied.statistics
    what = "‖X₀Wᵀ−XŴᵀ‖/‖X₀Wᵀ‖, X₀ the dense model's input," if twin else "‖XWᵀ−XŴᵀ‖/‖XWᵀ‖"
    table.caption = f"Errors are {what} on the calibration tokens, mean over sites and worst site."
    if prefix:
        table.title = f"{table.title}: {prefix}…"
    return table


def _region_report(run: PassRun) -> list[RenderableType]:
    """What each block gained on sequences that it was not trained on, and which stayed as they were."""
    table = Table(title=f"{spec_text(run.applied)}: {run.seconds:.1f} s", title_justify="left", caption_justify="left")
    table.add_column("block", overflow="fold")
    for column in ("loss", "before", "after", "gain", "rate", "time"):
        table.add_column(column, justify="right")
    for region in run.regions:
        gain = "–" if region.rate is None else f"{1 - region.after / region.before:.1%}"
        rate = "kept as it was" if region.rate is None else f"{region.rate:g}"
        figures = (f"{region.before:.4g}", f"{region.after:.4g}", gain, rate, f"{region.seconds:.1f} s")
        table.add_row(region.name, region.loss, *figures)
    table.caption = (
        "Losses are of held-back sequences: ‘error’ is mean ‖f−T‖²/‖T‖² against the dense model's, ‘kl’ of predictions."
    )
    return [table]


def _channel_report(run: PassRun) -> Table:
    """What each group of channels gained by another order."""
    table = Table(title=f"{spec_text(run.applied)}: {run.seconds:.1f} s", title_justify="left", caption_justify="left")
    table.add_column("read by", overflow="fold")
    # Short: names of layers are long, and a terminal has 80 columns.
    for column in ("channels", "moved", "before", "after", "time"):
        table.add_column(column, justify="right")
    for group in run.channels:
        table.add_row(
            group.name,
            f"{group.channels}" if group.lanes == 1 else f"{group.lanes} × {group.channels // group.lanes}",
            str(group.moved),
            f"{group.before:.2%}",
            f"{group.after:.2%}",
            f"{group.seconds:.1f} s",
        )
    table.caption = (
        "‘Before’ and ‘after’ are what the pattern would keep of Σ|W|²‖X‖² of the weights that read the channels."
    )
    return table


def shared_prefix(kinds: Iterable[str]) -> str:
    """What all names begin with, up to a dot; nothing where there is but one."""
    split = [name.split(".")[:-1] for name in kinds]
    if len(split) < 2:
        return ""
    shared = [parts[0] for parts in itertools.takewhile(lambda p: len(set(p)) == 1, zip(*split, strict=False))]
    return "".join(f"{part}." for part in shared)


def _figures(sites: Sequence[SiteResult]) -> tuple[str, str, str, str]:
    kept = sum(s.kept for s in sites) / len(sites)
    errors = [s.error for s in sites if s.error is not None]
    mean = f"{sum(errors) / len(errors):.4f}" if errors else "–"
    worst = f"{max(errors):.4f}" if errors else "–"
    return f"{kept:.2%}", mean, worst, f"{sum(s.seconds for s in sites):.1f} s"


def _by_kind(targets: Iterable[Target]) -> dict[str, list[Target]]:
    kinds: dict[str, list[Target]] = {}
    for target in targets:
        kinds.setdefault(target.site.kind, []).append(target)
    return kinds


def _skipped_lines(skipped: Sequence[Refused], what: str = "left dense") -> list[RenderableType]:
    reasons: dict[str, list[str]] = {}
    for item in skipped:
        reasons.setdefault(item.reason, []).append(item.node)
    return [Text(f"{what}: {_some(names)}: {reason}", "yellow") for reason, names in reasons.items()]


def _opaque_lines(opaque: Sequence[Opaque]) -> list[RenderableType]:
    reasons: dict[str, list[str]] = {}
    for item in opaque:
        reasons.setdefault(item.reason, []).append(", ".join(item.parameters))
    return [Text(f"not prunable: {_some(names)}: {reason}", "yellow") for reason, names in reasons.items()]


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _shape(site: LinearSite) -> str:
    stack = f"{site.experts}×" if site.expert_axis is not None else ""
    return f"{stack}{site.shape[0]}×{site.shape[1]}"


def _zeros(pattern: Pattern | Grid) -> str:
    return str(pattern) if isinstance(pattern, Grid) else f"{pattern} ({float(pattern.sparsity):.1%} zeros)"
