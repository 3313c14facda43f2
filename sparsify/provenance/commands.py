"""A run of a history as the command line that does it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

# Words that a recipe spells otherwise than the command line.
_OPTIONS = {"length": "sequence-length"}


def command_of(run: Mapping[str, Any]) -> str | None:
    """The command line of ``run``; None where the history does not say all of it: data or a model in memory, passes
    with names of their own, which a recipe alone can say.
    """
    recipe = run.get("recipe")
    if run.get("command") in ("unpack", "expand"):
        return f"sparsify {run['command']} FOLDER -o OUT"
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
    return f"{shlex.join(words)} -o OUT"
