"""What every registered pass is for and takes, for ``sparsify passes``: our own without importing them."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import typing
from dataclasses import dataclass
from typing import Any

from sparsify.errors import SpecError, first_line
from sparsify.method.declared import Declared, Option, declared, told_options, words
from sparsify.method.registry import is_own, known, registered


@dataclass(frozen=True)
class Description:
    """A pass for its user.

    Attributes:
        form: how it is written: NAME:PATTERN, or NAME. summary: what it does, in a line; does: in a paragraph.
        when: when to take it. example: a spec. options: its own. common, shared: those that it has with others, and
            what these are called. broken: why it cannot be used; None where it can.
    """

    name: str
    form: str
    summary: str = ""
    does: str = ""
    when: str = ""
    example: str = ""
    options: tuple[Option, ...] = ()
    common: str = ""
    shared: tuple[Option, ...] = ()
    broken: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "form": self.form,
            "summary": self.summary,
            "does": self.does,
            "when": self.when,
            "example": self.example,
            "options": [option.as_dict() for option in self.options],
            "common_options": [option.as_dict() for option in self.shared],
            **({} if self.broken is None else {"broken": self.broken}),
        }


def describe(name: str) -> Description:
    """The pass that ``name`` stands for.

    Raises:
        SpecError: nothing of that name is registered.
    """
    entry = known("sparsify.passes", name)
    try:
        found = declared(entry.module, entry.attr) if is_own(entry) else _loaded(entry)
    except Exception as error:
        # One broken package costs its own line and nothing else.
        why = error.found if isinstance(error, SpecError) else f"{type(error).__name__}: {first_line(error)}"
        return Description(name, name, broken=why)
    own = found.own
    return Description(
        name,
        f"{name}:PATTERN" if found.takes_pattern else name,
        summary=found.constants.get("summary") or "",
        does=words(found.doc.partition("\n\n")[0]),
        when=found.constants.get("when") or "",
        example=found.constants.get("example") or "",
        options=tuple(own.values()),
        common="" if found.shared is None else found.shared.constants["common_to"],
        shared=() if found.shared is None else tuple(o for n, o in found.shared.options.items() if n not in own),
    )


def describe_passes() -> list[Description]:
    """Every registered pass, by name."""
    return [describe(name) for name in sorted(registered("sparsify.passes"))]


def _loaded(entry: importlib.metadata.EntryPoint) -> Declared:
    """What a pass of another package says of itself, which is imported: its source may say it in any way."""
    from sparsify.method.spec import choices, find_pass

    kind = find_pass(entry.name)
    hints = typing.get_type_hints(kind)
    meanings: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        meanings |= told_options(each.__doc__ or "")

    def option(name: str, f: dataclasses.Field[Any]) -> Option:
        return Option(name, meanings.get(name, ""), choices(hints[name]), f.default)

    options = {name: option(name, f) for name, f in kind.options().items()}
    base = kind.shared_base()
    shared = None if base is None or base is kind else Declared({"common_to": base.common_to})
    if base is not None and shared is not None:
        shared.options = {name: option(name, f) for name, f in base.options().items()}
    constants = {name: getattr(kind, name) for name in ("summary", "when", "example")}
    fields = tuple(f.name for f in dataclasses.fields(kind))
    # A docstring that the dataclass made is its signature.
    doc = kind.__doc__ or ""
    doc = "" if doc.startswith(f"{kind.__name__}(") else doc
    return Declared(constants | {"__fields__": fields}, doc, options, shared)
