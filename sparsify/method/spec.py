"""Spec text to passes and back, and to backends: ``wanda:2:4``, ``wanda:50%,group=input,blocksize=128``.

The grammar is NAME:PATTERN[,OPTION=VALUE]…, the pattern being a grid (``int4``) for a pass that rounds; of what takes
none NAME[:OPTION=VALUE[,OPTION=VALUE]…]. Options are the fields of the dataclass and are checked against their types.
``parse_pass(str(spec_text(p))) == p`` for every pass, so a printed spec is a runnable one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import types
import typing
from typing import Any

from sparsify.errors import SpecError, near
from sparsify.method.base import Pass
from sparsify.method.pattern import Grid, Pattern, is_grid, parse_grid, parse_pattern
from sparsify.method.registry import find, known


def parse_pass(text: str) -> Pass:
    """Return the pass that ``text`` spells.

    Raises:
        SpecError: an unknown pass or option, a value of the wrong type, options that contradict each other.
        PatternError: a pattern that does not exist.
    """
    if not isinstance(text, str):
        raise SpecError(f"pass {text!r}", found=f"{type(text).__name__}, no text", do='Write "wanda:2:4", say')
    name, pattern, options = _parts(text)
    # What can be refused without loading the method (and torch with it) is.
    known("sparsify.passes", name)
    parsed = _pattern(pattern) if pattern else None
    kind = find_pass(name)
    rounds = typing.get_type_hints(kind).get("pattern") is Grid
    if parsed is None and kind.takes_pattern():
        do = f"Write {name}:int8 or {name}:int4, say" if rounds else f"Write {name}:2:4 or {name}:50%, say"
        raise SpecError(
            f"pass '{text}'", found="no grid after the name" if rounds else "no pattern after the name", do=do
        )
    if parsed is not None and not kind.takes_pattern():
        raise SpecError(f"pass '{text}'", found=f"a pattern, which {name} has not", do=f"Write {name}")
    if parsed is not None and rounds and not isinstance(parsed, Grid):
        do = f"Prune before it: --pass twin:{pattern} --pass {name}:int4"
        raise SpecError(f"pass '{text}'", found="a pattern of zeros, and it makes none: it rounds values", do=do)
    if isinstance(parsed, Grid) and not rounds:
        do = f"Round after it: --pass {name}:2:4 --pass round:{pattern}"
        raise SpecError(f"pass '{text}'", found="a grid of values, which is no pattern of zeros", do=do)
    given = _options(kind, name, options) | ({} if parsed is None else {"pattern": parsed})
    made: Pass = kind(**given)
    return made


def has_pattern(text: str) -> bool:
    """Whether the spec ``text`` has a pattern."""
    return bool(_parts(text)[1])


def with_pattern(text: str, pattern: str) -> str:
    """The spec ``text``, with ``pattern`` where it has none."""
    name, own, options = _parts(text)
    return ",".join([f"{name}:{own or pattern}", *options])


def find_pass(name: str) -> type[Pass]:
    """The class that ``name`` stands for.

    Raises:
        SpecError: there is none, it does not load, or it is no pass.
    """
    kind = find("sparsify.passes", name)
    if not (isinstance(kind, type) and issubclass(kind, Pass)):
        raise SpecError(
            f"pass '{name}'", found=f"{kind!r}, which is no Pass", do="Register a subclass of sparsify.method.base.Pass"
        )
    return kind


def check_pass(text: str) -> None:
    """Check the name and the pattern of a spec, without loading the pass.

    Raises:
        SpecError, PatternError: as :func:`parse_pass`.
    """
    name, pattern, _ = _parts(text)
    known("sparsify.passes", name)
    if pattern:
        _pattern(pattern)


def parse_backend(text: str) -> Any:
    """Return what the table holds for the backend that ``text`` spells: NAME[:OPTION=VALUE[,OPTION=VALUE]…].

    Raises:
        SpecError: an unknown backend or option, a value of the wrong type, options that contradict each other.
    """
    name, _, options = text.strip().partition(":")
    kind = find("sparsify.backends", name)
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise SpecError(
            f"backend '{name}'", found=f"{kind!r}, which is none", do="Register a dataclass: sparsify.compiler.backend"
        )
    return kind(**_options(kind, name, options.split(",") if options else []))


def spec_text(own: Pass) -> str:
    """The shortest spec that parses to ``own``, but for options that only Python can give."""
    given = [
        f"{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, f in own.options().items()
        if (value := getattr(own, name)) != f.default
    ]
    if own.takes_pattern():
        return ",".join([f"{own.name}:{getattr(own, 'pattern')}", *given])  # noqa: B009 (not every pass has one)
    return f"{own.name}:{','.join(given)}" if given else own.name


def split_specs(text: str) -> list[str]:
    """``wanda:50%,group=layer,sparsegpt:50%`` as two specs: what holds a = without a : before it is an option."""
    specs: list[str] = []
    for part in (piece.strip() for piece in text.split(",")):
        if specs and "=" in part and ":" not in part.partition("=")[0]:
            specs[-1] += f",{part}"
        elif part:
            specs.append(part)
    return specs


def split_pipeline(text: str) -> list[str]:
    """``twin:2:4+refine:rate=0.01`` as the specs of passes that run one after the other."""
    return [spec for piece in re.split(r"\+(?=\s*[a-z])", text) if (spec := piece.strip())]


def _pattern(text: str) -> Pattern | Grid:
    return parse_grid(text) if is_grid(text) else parse_pattern(text)


def _parts(text: str) -> tuple[str, str, list[str]]:
    """Name, pattern (empty where there is none) and options."""
    head, *options = text.strip().split(",")
    name, _, rest = head.partition(":")
    return (name, "", [rest, *options]) if "=" in rest else (name, rest, options)


def _options(kind: type, name: str, options: list[str]) -> dict[str, Any]:
    """Values of the fields of ``kind`` that ``options`` (KEY=VALUE) give."""
    # What is registered is a dataclass, of ours or of somebody else's.
    described: Any = kind
    shown = kind.options() if issubclass(kind, Pass) else {f.name: f for f in dataclasses.fields(described)}
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for option in options:
        key, equals, value = (part.strip() for part in option.partition("="))
        if not equals:
            raise SpecError(f"option '{option}' of {name}", found="no =", do="Options are written key=value")
        if key not in shown:
            raise SpecError(f"option '{key}' of {name}", found="no such option", do=near(key, shown))
        if key in values:
            raise SpecError(f"option '{key}' of {name}", found="given twice", do="Give it once")
        values[key] = _value(f"option {key}={value} of {name}", value, hints[key])
    return values


def _value(what: str, text: str, hint: Any) -> Any:
    """``text`` as a value of the type ``hint``."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        for each in typing.get_args(hint):
            with contextlib.suppress(SpecError):
                return _value(what, text, each)
        raise SpecError(what, found=f"'{text}' is not {choices(hint)}", do=f"Give {choices(hint)}")
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
    raise SpecError(what, found=f"'{text}' is not {choices(hint)}", do=f"Give {choices(hint)}")


def choices(hint: Any) -> str:
    """The values that a type allows, for people."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join(choices(h) for h in typing.get_args(hint) if h is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(str(a) for a in typing.get_args(hint))
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(hint, str(hint))
