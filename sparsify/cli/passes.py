"""``sparsify passes``: the methods, and what each takes. Imports no method, and so no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from sparsify.cli.options import AsJson, Debug, command_errors
from sparsify.cli.terminal import say
from sparsify.method.declared import Option
from sparsify.method.description import Description, describe, describe_passes


def passes_command(
    name: Annotated[str | None, typer.Argument(help="One of them, in full.", metavar="[NAME]")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the pruning methods, or say what one does, when to take it, and what each option means."""
    with command_errors(debug, "error"):
        if name is not None:
            found = describe(name.partition(":")[0])
            say(json.dumps(found.as_dict(), indent=2) if as_json else "\n".join(_in_full(found)), lines=True)
            return
        every = describe_passes()
        if as_json:
            say(json.dumps([own.as_dict() for own in every], indent=2), lines=True)
            return
        for own in every:
            say(f"{own.form}  {own.summary}" if own.broken is None else f"{own.form}  cannot be used: {own.broken}")
            _list(own.options)
        for called, options in {own.common: own.shared for own in reversed(every) if own.common}.items():
            say(f"{called} has")
            _list(options)
        say("sparsify passes NAME says what each option means")


def _list(options: Iterable[Option]) -> None:
    for option in options:
        say(f"    {option.name}={option.values} (default {_text(option.default)})")


def _in_full(own: Description) -> Iterable[str]:
    yield f"{own.form}  {own.summary}" if own.broken is None else f"{own.form}  cannot be used: {own.broken}"
    for what, text in (("", own.does), ("Take it ", own.when)):
        if text:
            yield f"\n{what}{text}{'' if text.endswith('.') else '.'}"
    if own.example:
        yield f"\n    sparsify compile MODEL --pass {own.example}"
    for title, options in (("Options", own.options), (f"Options of {own.common}", own.shared)):
        if options:
            yield f"\n{title}:"
        for option in options:
            yield f"    {option.name}={option.values}  (default {_text(option.default)})"
            if option.meaning:
                yield f"        {option.meaning}"


def _text(default: Any) -> str:
    """A default as it is written in a spec; what is not given is the method's own choice."""
    if default is None:
        return "the method's own"
    return str(default).lower() if isinstance(default, bool) else str(default)
