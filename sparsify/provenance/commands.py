"""A run of a history as the command line that does it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

# Words that a recipe spells otherwise than the command line.
_OPTIONS = {"length": "sequence-length"}


def commands_of(history: Sequence[Mapping[str, Any]]) -> list[str | None]:
    """The command line of each run, by :func:`command_of`. Each writes to where the next one reads."""
    recipes = [run.get("recipe") for run in history[1:]]
    models = [recipe.get("model") if isinstance(recipe, Mapping) else None for recipe in recipes]
    outs = [model if isinstance(model, str) else "OUT" for model in models]
    return [command_of(run, out) for run, out in zip(history, [*outs, "OUT"], strict=False)]


def command_of(run: Mapping[str, Any], out: str = "OUT") -> str | None:
    """The command line of ``run``, which writes to ``out``; None where the history does not say all of it: data or a
    model in memory, passes with names of their own, which a recipe alone can say.
    """
    recipe = run.get("recipe")
    if run.get("command") in ("unpack", "expand"):
        return f"sparsify {run['command']} FOLDER -o {shlex.quote(out)}"
    if not isinstance(recipe, Mapping) or "model" not in recipe:
        return None
    passes = recipe.get("passes", ())
    named = [passes] if isinstance(passes, str) else passes
    if not isinstance(named, (list, tuple)) or not all(isinstance(own, str) for own in named):
        return None
    words = ["sparsify", str(run.get("command")), str(recipe["model"])]
    words += [word for own in named for word in ("--pass", own)]
    for key, value in recipe.items():
        if key in ("model", "passes"):
            continue
        option = "--" + _OPTIONS.get(str(key), str(key)).replace("_", "-")
        if value is True:
            words.append(option)
        else:
            words += [word for one in (value if isinstance(value, list) else [value]) for word in (option, str(one))]
    return shlex.join([*words, "-o", out])
