"""What a pass says of itself, read from its source: nothing is imported, so that ``sparsify passes`` needs no torch.

A pass is a dataclass whose fields are its options. What each is for stands in the docstring of the class that has it,
under ``Args:`` or ``Attributes:``; which values it takes, in its annotation.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

_SIMPLE = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text"}


@dataclass(frozen=True)
class Option:
    """An option: what it is for, which values it takes, and what it is where it is not given."""

    name: str
    meaning: str
    values: str
    default: Any

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "meaning": self.meaning, "values": self.values, "default": self.default}


@dataclass
class Declared:
    """A class as its source says it, with what its bases say.

    Attributes:
        constants: class attributes. doc: of the class itself. options: by name, those of its bases among them.
        shared: of the nearest base whose options are told once for all its passes.
    """

    constants: dict[str, Any] = field(default_factory=dict)
    doc: str = ""
    options: dict[str, Option] = field(default_factory=dict)
    shared: Declared | None = None

    @property
    def own(self) -> dict[str, Option]:
        """Options that its shared base has not, or has with another default."""
        common = {} if self.shared is None else self.shared.options
        return {n: o for n, o in self.options.items() if n not in common or common[n].default != o.default}

    @property
    def takes_pattern(self) -> bool:
        return "pattern" in self.constants.get("__fields__", ())


@cache
def declared(module: str, name: str) -> Declared:
    """What the class ``name`` of ``module`` says of itself.

    Raises:
        LookupError: there is no such class in the source.
    """
    tree = _tree(module)
    home = _imported(tree).get(name)
    if home is not None:
        return declared(*home)
    found = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None)
    if found is None:
        raise LookupError(f"no class {name} in {module}")
    result = Declared(doc=ast.get_docstring(found) or "")
    for base in found.bases:
        if isinstance(base, ast.Name) and (base.id in _imported(tree) or _class_there(tree, base.id)):
            above = declared(module, base.id)
            result.constants |= above.constants
            result.options |= above.options
            result.shared = above if above.constants.get("__shared__") else above.shared
    result.constants["__shared__"] = False
    meanings = told_options(result.doc)
    fields = dict.fromkeys(result.constants.get("__fields__", ()))
    for line in found.body:
        if not (isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)):
            continue
        own = line.target.id
        if isinstance(line.annotation, ast.Subscript) and ast.unparse(line.annotation.value) == "ClassVar":
            result.constants[own] = None if line.value is None else _constant(module, line.value)
            continue
        fields[own] = None
        if own == "pattern" or not _has_text(line.value):
            continue
        before = result.options.get(own)
        meaning = meanings.get(own) or (before.meaning if before else "")
        default = None if line.value is None else _constant(module, line.value)
        result.options[own] = Option(own, meaning, _values(module, line.annotation), default)
    for own, meaning in meanings.items():
        # A pass may say more of an option that a base of it has.
        if own in result.options:
            option = result.options[own]
            result.options[own] = Option(own, meaning, option.values, option.default)
    result.constants["__fields__"] = tuple(fields)
    result.constants["__shared__"] = any(
        isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name) and n.target.id == "common_to"
        for n in found.body
    )
    return result


def told_options(doc: str) -> dict[str, str]:
    """What the sections ``Args:`` and ``Attributes:`` of a docstring say of each name, as sentences for people."""
    found: dict[str, str] = {}
    for section in re.findall(r"^(?:Args|Attributes):\n((?:[ ]{4}.*\n?|\n)+)", inspect.cleandoc(doc), re.M):
        for name, text in re.findall(r"^ {4}(\w+): (.*(?:\n {8,}.*)*)", section, re.M):
            found[name] = words(text)
    return found


def words(text: str) -> str:
    """Text of a docstring for a terminal: on one line, without its marks."""
    return re.sub(r"(?::\w+:)?`+~?([^`]*)`+", r"\1", " ".join(text.split()))


@cache
def _tree(module: str) -> ast.Module:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise LookupError(f"no source of {module}")
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


def _class_there(tree: ast.Module, name: str) -> bool:
    return any(isinstance(n, ast.ClassDef) and n.name == name for n in tree.body)


def _imported(tree: ast.Module) -> Mapping[str, tuple[str, str]]:
    """Names that a module imports from others of ours: the module, and the name there."""
    return {
        alias.asname or alias.name: (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("sparsify")
        for alias in node.names
    }


def _assigned(module: str, name: str) -> tuple[str, ast.expr] | None:
    """The module and the expression that ``name`` stands for in ``module``."""
    tree = _tree(module)
    if (home := _imported(tree).get(name)) is not None:
        return _assigned(*home)
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(t, ast.Name) and t.id == name for t in targets):
                return module, node.value
    return None


def _constant(module: str, value: ast.expr) -> Any:
    """What an expression is, where it is a constant or the name of one; its text otherwise."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        value = next((k.value for k in value.keywords if k.arg == "default"), value)
    if isinstance(value, ast.Name) and (found := _assigned(module, value.id)) is not None:
        return _constant(*found)
    try:
        return ast.literal_eval(value)
    except ValueError:
        return ast.unparse(value)


def _has_text(value: ast.expr | None) -> bool:
    """Whether a field has a text form: ``metadata={"text": False}`` says not."""
    given = value.keywords if isinstance(value, ast.Call) else []
    return not any(k.arg == "metadata" and ast.literal_eval(k.value).get("text") is False for k in given)


def _values(module: str, hint: ast.expr) -> str:
    """The values that an annotation allows, for people."""
    return " or ".join(dict.fromkeys(_each(module, hint)))


def _each(module: str, hint: ast.expr) -> Iterator[str]:
    if isinstance(hint, ast.BinOp):
        yield from _each(module, hint.left)
        yield from _each(module, hint.right)
    elif isinstance(hint, ast.Subscript) and ast.unparse(hint.value) == "Literal":
        told = hint.slice.elts if isinstance(hint.slice, ast.Tuple) else [hint.slice]
        yield from (str(ast.literal_eval(value)) for value in told)
    elif isinstance(hint, ast.Name):
        found = None if hint.id in _SIMPLE else _assigned(module, hint.id)
        if found is None:
            yield _SIMPLE.get(hint.id, hint.id)
        else:
            yield from _each(*found)
    elif not (isinstance(hint, ast.Constant) and hint.value is None):
        yield ast.unparse(hint)
