"""Spec text to passes and back, and to backends: ``wanda:2:4``, ``wanda:50%,group=input,blocksize=128``.

The grammar is NAME:PATTERN[,OPTION=VALUE]…; options are the fields of the pass's dataclass and are checked
against their types. ``parse_pass(str(spec_text(p))) == p`` for every pass, so a printed spec is a runnable one.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from sparsify.backend import Backend
from sparsify.errors import SpecError, near
from sparsify.pattern import parse_pattern
from sparsify.registry import find, registered
from sparsify.structural import StructuralPass
from sparsify.weight_pass import WeightPass

AnyPass = WeightPass | StructuralPass


def parse_pass(text: str) -> AnyPass:
    """Return the pass that ``text`` spells.

    Raises:
        SpecError: an unknown pass or option, a value of the wrong type, options that contradict each other.
        PatternError: a pattern that does not exist.
    """
    head, *options = text.strip().split(",")
    name, _, pattern = head.partition(":")
    kind = find("sparsify.passes", name)
    if not pattern:
        raise SpecError(f"pass '{text}'", found="no pattern after the name", do=f"Write {name}:2:4 or {name}:50%, say")
    return kind(parse_pattern(pattern), **_options(kind, name, options))


def parse_backend(text: str) -> Backend:
    """Return the backend that ``text`` spells: NAME[:OPTION=VALUE[,OPTION=VALUE]…].

    Raises:
        SpecError: an unknown backend or option, a value of the wrong type, options that contradict each other.
    """
    name, _, options = text.strip().partition(":")
    kind = find("sparsify.backends", name)
    return kind(**_options(kind, name, options.split(",") if options else []))


def spec_text(weight_pass: AnyPass) -> str:
    """The shortest spec that parses to ``weight_pass``."""
    text = f"{weight_pass.name}:{weight_pass.pattern}"
    for f in dataclasses.fields(weight_pass):
        value = getattr(weight_pass, f.name)
        if f.name != "pattern" and value != f.default:
            text += f",{f.name}={str(value).lower() if isinstance(value, bool) else value}"
    return text


def _options(kind: type, name: str, options: list[str]) -> dict[str, Any]:
    """Values of the fields of ``kind`` that ``options`` (KEY=VALUE) give."""
    fields = {f.name: f for f in dataclasses.fields(kind) if f.name != "pattern"}
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for option in options:
        key, equals, value = (part.strip() for part in option.partition("="))
        if not equals:
            raise SpecError(f"option '{option}' of {name}", found="no =", do="Options are written key=value")
        if key not in fields:
            raise SpecError(f"option '{key}' of {name}", found="no such option", do=near(key, fields))
        if key in values:
            raise SpecError(f"option '{key}' of {name}", found="given twice", do="Give it once")
        values[key] = _value(f"option {key}={value} of {name}", value, hints[key])
    return values


def describe_passes() -> list[tuple[str, str, dict[str, str]]]:
    """Name, one-line summary and options with their defaults of every registered pass.

    Options that all passes have stand once, at the end, under the name "every pass but structural ones".
    """
    rows = []
    common = {f.name: f.default for f in dataclasses.fields(WeightPass)}
    for name in sorted(registered("sparsify.passes")):
        kind = find("sparsify.passes", name)
        hints = typing.get_type_hints(kind)
        options = {
            f.name: f"{_choices(hints[f.name])} (default {f.default})"
            for f in dataclasses.fields(kind)
            if f.name != "pattern" and not (issubclass(kind, WeightPass) and common.get(f.name, object) == f.default)
        }
        rows.append((name, kind.summary, options))
    hints = typing.get_type_hints(WeightPass)
    shared = {n: f"{_choices(hints[n])} (default {default})" for n, default in common.items() if n != "pattern"}
    return [*rows, ("every pass but structural ones", "", shared)]


def _value(what: str, text: str, hint: Any) -> Any:
    """``text`` as a value of the type ``hint``."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        if text in typing.get_args(hint):
            return text
    elif hint is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
    elif hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            pass
    elif hint is str:
        return text
    raise SpecError(what, found=f"'{text}' is not {_choices(hint)}", do=f"Give {_choices(hint)}")


def _choices(hint: Any) -> str:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join(_choices(h) for h in typing.get_args(hint) if h is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(str(a) for a in typing.get_args(hint))
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(hint, str(hint))
