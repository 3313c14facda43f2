"""What a compile did, for people in Python: a line, a text, a table of HTML."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsify.compiler.runs import PassRun, zeros_of
from sparsify.context import SiteResult
from sparsify.ir.weights import Weights
from sparsify.method.spec import spec_text
from sparsify.quantized.compressed_tensors.sparse import BITMASK, TWO_FOUR
from sparsify.words import format_bytes, plain

# Names of a kind that are said before the rest is counted.
_NAMES = 3
_HEAD = ("site", "sites", "kept", "error", "worst", "time")


@dataclass(frozen=True)
class Summary:
    """Attributes:
    model: its name. weights: all of its parameters. structural: specs of the passes that made it smaller.
    smaller: what those took out, in lines. runs: the other passes. data: what was calibrated on. where: it lies.
    judged: perplexity before and after, in lines.
    """

    model: str
    weights: Weights
    structural: Sequence[str]
    smaller: Sequence[str]
    runs: Sequence[PassRun]
    data: str | None
    where: str
    judged: Sequence[str] = ()

    def line(self) -> str:
        """One line: model, passes, how much is zero, and where it lies."""
        passes = " + ".join([*self.structural, *(spec_text(run.applied) for run in self.runs)]) or "no pass"
        zeros = (
            f", {self.zeros:.1%} of its weights zero" if any(run.sites and not run.rounds for run in self.runs) else ""
        )
        return plain(f"<Compiled {self.model}: {passes}{zeros}; {self.where}>")

    @property
    def zeros(self) -> float:
        """The share of zeros that the pruned sites hold, of all numbers of the model."""
        every = sum(self.weights.shape(name).numel() for name in self.weights.parameters())
        return zeros_of(self.runs) / max(1, every)

    def text(self) -> str:
        """All of it, a table to each pass that pruned or rounded."""
        lines = [self.line(), *self.smaller]
        if self.data is not None:
            lines.append(f"calibrated on {self.data}")
        for run in self.runs:
            lines.append(f"{spec_text(run.applied)}, {run.seconds:.1f} s{_said(run)}")
            rows = [_HEAD, *_rows(run.sites)] if run.sites else []
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            for name, *figures in rows:
                cells = [name.ljust(widths[0]), *(f.rjust(w) for f, w in zip(figures, widths[1:], strict=True))]
                lines.append("  " + "  ".join(cells).rstrip())
            lines += [f"  left as it was: {line}" for line in _left(run)]
        return plain("\n".join([*lines, *self.judged]), keep="\n")

    def html(self) -> str:
        """The line, and the tables as one."""
        rows = []
        for run in self.runs:
            said = html.escape(plain(f"{spec_text(run.applied)}, {run.seconds:.1f} s{_said(run)}"))
            rows.append(f'<tr><th colspan="{len(_HEAD)}" style="text-align:left">{said}</th></tr>')
            for name, *figures in _rows(run.sites):
                cells = "".join(f"<td>{html.escape(figure)}</td>" for figure in figures)
                rows.append(f'<tr><td style="text-align:left">{html.escape(plain(name))}</td>{cells}</tr>')
        head = "".join(f"<th>{name}</th>" for name in _HEAD)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>" if rows else ""
        judged = "".join(f"<p>{html.escape(plain(line))}</p>" for line in self.judged)
        return f"<div><p>{html.escape(self.line())}</p>{table}{judged}</div>"


def _rows(sites: Sequence[SiteResult]) -> list[tuple[str, ...]]:
    """The sites of each kind, and all of them."""
    kinds: dict[str, list[SiteResult]] = {}
    for site in sites:
        kinds.setdefault(site.kind, []).append(site)
    groups = list(kinds.items()) + ([("all", list(sites))] if len(kinds) > 1 else [])
    return [(kind, str(len(own)), *_figures(own)) for kind, own in groups]


def _figures(sites: Sequence[SiteResult]) -> tuple[str, ...]:
    sizes = [math.prod(site.shape) for site in sites]
    kept = sum(site.kept * size for site, size in zip(sites, sizes, strict=True)) / max(1, sum(sizes))
    errors = [site.error for site in sites if site.error is not None]
    mean, worst = (f"{sum(errors) / len(errors):.4f}", f"{max(errors):.4f}") if errors else ("–", "–")
    return f"{kept:.2%}", mean, worst, f"{sum(site.seconds for site in sites):.1f} s"


def _said(run: PassRun) -> str:
    """What a pass without sites did."""
    if run.regions:
        gained = [region for region in run.regions if region.rate is not None]
        return f": {len(gained)} of {len(run.regions)} blocks gained"
    if run.channels:
        moved = sum(group.moved for group in run.channels)
        return f": {moved} channels of {len(run.channels)} groups moved"
    return "" if run.sites else f": {len(run.written)} weights written"


def _left(run: PassRun) -> list[str]:
    """What a pass did not touch, and why."""
    reasons: dict[str, list[str]] = {}
    for refused in run.skipped:
        reasons.setdefault(refused.reason, []).append(str(refused.node))
    said = []
    for reason, names in reasons.items():
        more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
        said.append(f"{', '.join(names[:_NAMES])}{more} ({reason})")
    return said


def as_dense(model: str, quantization: Mapping[str, Any]) -> str:
    """What a model that is quantized, or stored without its zeros, grows to."""
    method, dtype = quantization["method"], quantization["dtype"]
    stored, dense = (format_bytes(quantization[key]) for key in ("stored_bytes", "dense_bytes"))
    whole = method in (TWO_FOUR, BITMASK)
    how = f"stored without its zeros ({method}, {stored})" if whole else f"quantized ({method}, {stored})"
    return f"{model} is {how}; dense, in {dtype}, it takes {dense}"
