"""What ``sparsify.json``, and what ``eval --json`` printed, must look like where they are read: kinds and bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def _text(value: object) -> bool:
    return isinstance(value, str)


def _count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


def _share(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1  # type: ignore[operator]


def _flag(value: object) -> bool:
    return isinstance(value, bool)


def _mapping(value: object) -> bool:
    return isinstance(value, Mapping)


def _maybe(form: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or form(value)


def _one_of(*words: str) -> Callable[[object], bool]:
    return lambda value: value in words and isinstance(value, str)


def _cut(value: object) -> bool:
    """(parameter, axis, positions that stay)."""
    if not (isinstance(value, list) and len(value) == 3 and isinstance(value[2], list)):
        return False
    return _text(value[0]) and _count(value[1]) and all(map(_count, value[2]))


def _figure(value: object) -> bool:
    return type(value) in (int, float)


def _two(form: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and len(value) == 2 and all(map(form, value))


# Fields that code reads. Those in NEEDED must be there; others may be missing, and what is not named is nobody's.
_SITE = {
    "name": _text,
    "tensors": [_text],
    "shape": [_count],
    "pattern": _text,
    "kept": _share,
    "error": _maybe(_figure),
}  # fmt: skip
_LEFT = {"name": _maybe(_text), "reason": _text}
_REGION = {"name": _text, "loss": _text, "before": _figure, "after": _figure, "rate": _maybe(_figure)}
_GROUP = {"name": _text, "channels": _count, "moved": _count, "kept_before": _figure, "kept_after": _figure}
_PASS = {
    "spec": _text,
    "name": _text,
    "options": _mapping,
    "sites": [_SITE],
    "rounded": [_SITE],
    "regions": [_REGION],
    "channels": [_GROUP],
    "skipped": [_LEFT],
}  # fmt: skip
_PART = {"kind": _text, "name": _text, "before": _count, "after": _count, "members": [_cut]}
_PACKED = {"name": _text, "layout": _text, "dense_bytes": _count, "bytes": _count, "timing": _maybe(_mapping)}
_RAN = {
    "spec": _text,
    "pruned": _count,
    "rounded": _count,
    "left": _share,
    "error": _figure,
    "parameters": _two(_count),
}
_RUN = {
    "command": _text,
    "date": _text,
    "calibration": _maybe(_mapping),
    "source": {"name": _text, "weights": _maybe(_text)},
    "passes": [_RAN],
    "whole": {"numbers": _count, "kept": _share},
    "perplexity": _two(_figure),
    "versions": _mapping,
}  # fmt: skip
_LOAD = {"sent": _count, "worked": _figure, "waited": _figure}
FORM: dict[str, Any] = {
    "model": _text,
    "passes": [_PASS],
    "evaluation": {
        "data": _text,
        "windows": _count,
        "sequence_length": _count,
        "sha256": _text,
        "dense": _maybe(_figure),
        "pruned": _maybe(_figure),
        "standard_error": _maybe(_figure),
        "verdict": _text,
    },
    "search": {"dense_perplexity": _figure, "perplexity": _figure, "data": _text, "sha256": _text},
    "allow_nan": _flag,
    "compute_dtype": _one_of("float32", "bfloat16", "float16"),
    "structure": [{"ragged": _flag, "config": _mapping, "cuts": [_PART]}],
    "packed": {"dense_files": _maybe(_mapping), "sites": [_PACKED]},
    "tuned": {"seconds": _figure},
    "processes": {"count": _count, "bytes": _count, "tokens_per_second": _figure, "ranks": [_LOAD]},
    "calibration": _maybe(_mapping),
    "not_understood": [{"tensors": [_text], "reason": _text}],
    "history": [_RUN],
    "card": {"dense": _maybe(_text)},
    "onnx": {
        "compute": _one_of("float32", "float16", "bfloat16"),
        "transposed": [_text],
        "weights": _text,
        "part": _text,
        "dtype": _maybe(_text),
    },
}  # fmt: skip
# What ``sparsify eval --json`` prints of each model, as far as a report reads it.
_SCORE = {
    "task": _text,
    "metric": _text,
    "value": _maybe(_figure),
    "standard_error": _maybe(_figure),
    "n": _count,
    "higher_is_better": _flag,
    "share": _flag,
    "chance": _maybe(_figure),
    "tasks": _count,
    "unit": _text,
}
_PAIR = {
    "task": _text,
    "metric": _text,
    "difference": _figure,
    "standard_error": _maybe(_figure),
    "changed": _count,
    "verdict": _maybe(_text),
}
EVALUATED = {
    "model": _text,
    "manifest": _maybe(_text),
    "perplexity": _maybe(_figure),
    "windows": _maybe(_count),
    "sequence_length": _maybe(_count),
    "data": _maybe(_text),
    "sha256": _maybe(_text),
    "against_the_first": {"standard_error": _maybe(_figure), "verdict": _text},
    "scores": [_SCORE],
    "scores_against_the_first": [_PAIR],
    "notes": [_text],
}
_OF_A_SCORE = {"task", "metric", "n", "difference", "changed"}
NEEDED = _OF_A_SCORE | {"sites", "tensors", "pattern", "kept", "ragged", "cuts", "members", "command", "numbers"}


def misfit(content: object, form: Any = None, where: str = "") -> str | None:
    """Where ``content`` has not the ``form`` (that of a manifest), and what is there; None where it has."""
    form = FORM if form is None else form
    if isinstance(form, dict):
        if not isinstance(content, Mapping):
            return _said(where, content)
        for name, inner in form.items():
            path = f"{where}.{name}" if where else name
            if name not in content:
                if name in NEEDED:
                    return f"{path} is missing"
            elif (found := misfit(content[name], inner, path)) is not None:
                return found
        return None
    if isinstance(form, list):
        if not isinstance(content, list):
            return _said(where, content)
        parts = (misfit(item, form[0], f"{where}[{at}]") for at, item in enumerate(content))
        return next((found for found in parts if found is not None), None)
    return None if form(content) else _said(where, content)


def _said(where: str, content: object) -> str:
    text = repr(content)
    return f"{where or 'the whole'} is {text if len(text) <= 60 else text[:57] + '…'}"
