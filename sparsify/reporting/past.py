"""The sections of every run that made the model what it is, and of how to run them again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sparsify.provenance.commands import commands_of
from sparsify.provenance.markdown import short
from sparsify.reporting.facts import Facts
from sparsify.reporting.markup import Markup, code, joined, section, tag


def history(facts: Facts) -> Markup:
    """Every run: when, of what, by which passes, on which data, with which versions."""
    return section("History", *(_run(at, run) for at, run in enumerate(facts.history, 1)))


def _run(at: int, run: Mapping[str, Any]) -> Markup:
    source, data = run.get("source", {}), run.get("calibration") or {}
    rows: list[tuple[str, object]] = [("of", code(short(source.get("name") or "a model in memory")))]
    if source.get("weights"):
        rows.append(("its weights", code(source["weights"])))
    for own in run.get("passes", ()):
        told = [f"{own['pruned']:,} weights"] if "pruned" in own else []
        told += [f"{own['rounded']:,} weights rounded"] if "rounded" in own else []
        told += [f"{own['left']:.2%} kept"] if "left" in own and "rounded" not in own else []
        told += [f"mean error {own['error']:.4f}"] if "error" in own else []
        told += ["{:,} → {:,} numbers".format(*own["parameters"])] if "parameters" in own else []
        rows.append(("pass", joined([code(short(own.get("spec", ""))), f": {', '.join(told)}" if told else None])))
    rows += [
        (key, ", ".join(f"{k} {short(v)}" for k, v in run[key].items() if v is not None))
        for key in ("training", "teacher")
        if isinstance(run.get(key), Mapping)
    ]
    rows += [(key, short(run[key])) for key in ("data", "validation", "steps", "tokens") if key in run]
    if data:
        said = ", ".join(
            f"{key.replace('_', ' ')} {short(data[key])}"
            for key in ("sequences", "sequence_length", "seed")
            if key in data
        )
        rows += [("calibrated on", short(data.get("data", ""))), ("", said)]
        rows += [("its token ids", code(data["sha256"]))] if data.get("sha256") else []
    if "whole" in run:
        rows.append(("left", f"{run['whole']['kept']:.2%} of {run['whole']['numbers']:,} numbers are not zero"))
    if versions := run.get("versions"):
        rows.append(("versions", ", ".join(f"{name} {short(value)}" for name, value in versions.items())))
    title = tag("h3", f"Step {at}: {short(run['command'])}", tag("time", run.get("date")) if run.get("date") else None)
    return tag("article", title, tag("dl", *(joined([tag("dt", key), tag("dd", value)]) for key, value in rows)))


def again(facts: Facts) -> Markup:
    """The commands, or the recipe where a command line does not say all of it."""
    parts: list[object] = []
    for at, (run, command) in enumerate(zip(facts.history, commands_of(facts.history), strict=True), 1):
        name = f"Step {at}" if len(facts.history) > 1 else None
        if command is not None:
            parts += [tag("h3", name) if name else None, tag("pre", code(command), tabindex="0")]
        elif isinstance(run.get("recipe"), Mapping):
            recipe = json.dumps(run["recipe"], indent=2, ensure_ascii=False)
            parts += [
                tag("h3", name) if name else None,
                tag("p", "As a recipe, for ", code("sparsify compile --recipe FILE"), ":"),
                tag("pre", code(recipe), tabindex="0"),
            ]
        else:
            parts += [
                tag("h3", name) if name else None,
                tag("p", "Nobody kept its words: a model, data or a pass was in the memory of Python."),
            ]
    options = [_options(own) for own in facts.passes if own.get("options")]
    if options:
        parts.append(tag("details", tag("summary", "Every option of the last step's passes"), tag("dl", *options)))
    return section("To make it again", *parts)


def _options(own: Mapping[str, Any]) -> Markup:
    every = {**own["options"], **{key: own.get(key) for key in ("schedule", "only", "ignore")}}
    said = ", ".join(f"{key}={short(value)}" for key, value in every.items() if value not in (None, [], ""))
    return joined([tag("dt", code(short(own.get("spec", "")))), tag("dd", said)])
