"""The words of a compile as a recipe, which ``sparsify.json`` keeps: what makes the same output again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from sparsify.compiler.backend import Backend
from sparsify.compiler.request import Request
from sparsify.method.spec import spec_text

# What is no different from one output to another is not said.
DEFAULTS = {"to": "hf", "schedule": "layer", "seed": 0}


def recipe_of(model: str | Path | nn.Module, request: Request, **others: Any) -> dict[str, Any] | None:
    """The recipe of a request; None where some of it is in memory alone: a module, batches, an object of Python.

    Args:
        others: words that the request does not hold, by their keys of a recipe.
    """
    in_memory = isinstance(model, nn.Module) or isinstance(request.teacher, nn.Module) or not request.is_named
    if in_memory or not isinstance(request.evaluate, str | None):
        return None
    passes: list[Any] = []
    for own, named in zip(request.passes, request.named_by_passes, strict=True):
        words = {"pass": spec_text(own), "only": list(named.only), "ignore": list(named.ignore)}
        passes.append({k: v for k, v in words.items() if v} if named.only or named.ignore else spec_text(own))
    told = {
        "model": as_typed(model),
        "passes": passes,
        "calibration": request.data,
        "samples": request.samples,
        "sequence_length": request.length,
        "schedule": request.schedule,
        "only": list(request.only),
        "ignore": list(request.ignore),
        "to": backend_text(request.backend),
        "chat_template": as_typed(request.template),
        "teacher": as_typed(request.teacher),
        "eval": request.evaluate,
        "eval_windows": request.eval_windows,
        **{key: None if value is None else _plain(value) for key, value in others.items()},
    }
    return without_defaults(told, DEFAULTS)


def without_defaults(told: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe says of ``told``: neither what is not given nor what is so by itself."""
    return {k: v for k, v in told.items() if v not in (None, False, []) and v != defaults.get(k)}


def backend_text(backend: Backend) -> str:
    """The spec of a backend: its name and the options that are not their defaults."""
    told: Any = backend
    options = [
        f"{f.name}={str(value).lower() if isinstance(value, bool) else value}"
        for f in (dataclasses.fields(told) if dataclasses.is_dataclass(told) else ())
        if (value := getattr(backend, f.name)) != f.default
    ]
    return f"{backend.name}:{','.join(options)}" if options else backend.name


def as_typed(place: Any) -> Any:
    """A path from where the command was given, where it lies below; a recipe is run from there again."""
    if not isinstance(place, Path):
        return place
    here = Path.cwd()
    return str(place.relative_to(here)) if place.is_absolute() and place.is_relative_to(here) else str(place)


def _plain(value: Any) -> Any:
    """A dtype of torch by its name; all else as it is."""
    return value if isinstance(value, (bool, int, str)) else str(value).removeprefix("torch.")
