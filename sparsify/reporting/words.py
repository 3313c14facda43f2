"""The sentences of a page: what was done to which model, how much of it is zero, and what that cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsify.provenance.figures import Figure
from sparsify.provenance.markdown import short
from sparsify.reporting.facts import Facts

# Words that are said of a command that only writes the weights in another form.
_FORMS = {"unpack": "written dense again by sparsify unpack", "expand": "written dense again by sparsify expand"}


def number(value: float | None) -> str:
    """A perplexity."""
    if value is None:
        return "no number"
    return f"{value:,.2f}" if value < 1e5 else f"{value:.3g}"


def times(ratio: float | None) -> str:
    """``1.127×``."""
    return "–" if ratio is None else f"{ratio:.3f}×" if ratio < 100 else f"{ratio:.3g}×"


def summary(facts: Facts) -> list[str]:
    """The page in sentences, one for each step, one of the whole model, one for each figure."""
    said = [_step(number, run, facts.base if number == 1 else "") for number, run in enumerate(facts.history, 1)]
    if (whole := facts.whole) is not None:
        zeros, every = 1 - whole["kept"], whole["numbers"]
        said.append(f"Of the whole model's {every:,} numbers {zeros:.2%} are zero.")
    if facts.kind.form:
        said.append(f"The folder holds it {facts.kind.form}.".replace("holds it a ", "holds a "))
    if "ragged" in facts.kind.tags:
        said.append("Its layers differ in width: sparsify.load reads it, other loaders refuse it.")
    said += [cost(figure) for figure in facts.figures]
    said += [sentence for own in facts.measured for sentence in own.sentences()]
    if not facts.figures and not facts.measured:
        said.append("What that cost in quality was not measured when it was written.")
    return said


def cost(figure: Figure) -> str:
    """A perplexity before and after, and its verdict."""
    change = f"from {number(figure.before)} to {number(figure.after)}"
    verdict = f": {figure.verdict.partition(';')[0]}" if figure.verdict else ""
    if not verdict and figure.ratio is not None:
        verdict = f", {times(figure.ratio)}"
    return f"Perplexity on {short(figure.data)} went {change} ({figure.what}){verdict}."


def _step(at: int, run: Mapping[str, Any], base: str) -> str:
    step = f"Step {at}"
    command, passes = str(run["command"]), run.get("passes", ())
    model = short(base) if base else "the result"
    if command in _FORMS:
        return f"{step}: {_FORMS[command]}."
    if command == "tune":
        steps = f" in {run['steps']:,} steps" if isinstance(run.get("steps"), int) else ""
        data = f" on {short(run['data'])}" if run.get("data") else ""
        return f"{step}: {model} was trained{steps}{data}, its zeros held."
    if not passes:
        return f"{step}: {model} was written by sparsify {short(command)}."
    done = "; ".join(_pass(own) for own in passes)
    return f"{step}, on {model}: {done}{_data(run)}."


def _pass(own: Mapping[str, Any]) -> str:
    spec = short(own.get("spec", "a pass"))
    if "parameters" in own:
        before, after = own["parameters"]
        return f"{spec} left {after:,} of {before:,} numbers"
    if "pruned" in own and "left" in own:
        weights = "one weight matrix" if own["pruned"] == 1 else f"{own['pruned']:,} weight matrices"
        error = f" (mean output error {own['error']:.3f})" if "error" in own else ""
        return f"{spec} kept {own['left']:.2%} of {weights}{error}"
    if "rounded" in own:
        weights = "one weight matrix" if own["rounded"] == 1 else f"{own['rounded']:,} weight matrices"
        error = f" (mean output error {own['error']:.3f})" if "error" in own else ""
        return f"{spec} rounded {weights}{error}"
    return f"{spec} ran"


def _data(run: Mapping[str, Any]) -> str:
    data = run.get("calibration") or {}
    if not data.get("data"):
        return ""
    size = f"{data.get('sequences')} sequences of {data.get('sequence_length')} tokens of "
    return f", calibrated on {size if data.get('sequences') else ''}{short(data['data'])}"


def named(names: Sequence[str], most: int = 6) -> str:
    """The first of ``names``, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(short, names[:most])) + more
