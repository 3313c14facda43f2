"""What imports what, read off the text: lazy and type-only imports count as much as any other."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

# The folders at the top of the repository, and what they are imported as.
PACKAGES = {"sparsify": "sparsify", "passes": "sparsify.passes", "backends": "sparsify.backends"}

# Storeys from the ground up: a room imports from lower ones only, rooms of one storey not from each other.
STOREYS: tuple[tuple[str, ...], ...] = (
    ("durable", "errors", "import_path", "tensors"),
    ("words", "world"),
    ("context",),
    ("finite", "host"),
    ("precision", "progress"),
    ("ir", "files", "method", "runtime"),
    ("quantized", "journal"),
    ("analysis", "frontend"),
    ("data", "provenance"),
    ("calibration",),
    ("prune", "refine", "quality"),
    ("structure",),
    ("compiler",),
    ("evaluation", "inspection", "reporting", "comparing", "lm_eval"),
    ("tuning", "searching"),
    ("cli",),
    ("passes", "backends"),
)
# What a room may import although lower storeys hold more: kernels know no compiler, mathematics knows no graph.
ONLY = {
    "method": {"errors", "tensors"},
    "runtime": {"durable", "errors", "import_path"},
    "passes": {"method", "errors", "tensors"},
    "passes.lowering": {"method", "errors", "analysis", "ir", "runtime"},
}
# The package's face and what it does when it is imported; they load everything else by name.
FACES = {"sparsify", "sparsify.__main__", "sparsify.transformers_hook"}


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package below the repository ``root``."""
    found = {}
    for folder, package in PACKAGES.items():
        for file in sorted((root / folder).rglob("*.py")):
            parts = [package, *file.relative_to(root / folder).with_suffix("").parts]
            found[".".join(part for part in parts if part != "__init__")] = file
    return found


def imports(root: Path) -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports, anywhere in its text; names of a lazy face are followed home."""
    known = modules(root)
    homes = {
        name: _lazy_names_of(path.read_text(encoding="utf-8"))
        for name, path in known.items()
        if path.name == "__init__.py"
    }
    edges: dict[str, set[str]] = {}
    for module, path in known.items():
        edges[module] = set()
        for name in _imported(path):
            target = _resolve(name, known, homes)
            if target is not None and target != module:
                edges[module].add(target)
    return edges


def violations(root: Path) -> list[str]:
    """Every import that goes up or sideways, or that the contract forbids, as a sentence."""
    found = []
    for module, targets in imports(root).items():
        if module in FACES or module in ("sparsify.passes", "sparsify.backends"):
            continue
        for target in sorted(targets - FACES):
            why = _forbidden(module, target)
            if why is not None:
                found.append(f"{module} imports {target}: {why}")
    return found


def circles(root: Path) -> list[str]:
    """Modules from which imports lead back to them."""
    edges = {module: targets - FACES for module, targets in imports(root).items()}
    return sorted(module for module in edges if module in behind(module, edges))


def behind(module: str, edges: dict[str, set[str]]) -> set[str]:
    """Everything that ``module`` imports, directly or through others."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        for target in edges[todo.pop()] - seen:
            seen.add(target)
            todo.append(target)
    return seen


def room(module: str) -> str:
    """``sparsify.prune.engine`` lies in ``prune``, ``sparsify.passes.wanda`` in ``passes``."""
    return module.split(".")[1] if "." in module else module


def _forbidden(module: str, target: str) -> str | None:
    here, there = room(module), room(target)
    if here == there:
        return _forbidden_inside(module, target) if here == "passes" else None
    allowed = ONLY.get(".".join(module.split(".")[1:3]), ONLY.get(here))
    if allowed is not None:
        return None if there in allowed else f"{here} may import {', '.join(sorted(allowed))}"
    floor = {name: number for number, names in enumerate(STOREYS) for name in names}
    for name in (here, there):
        if name not in floor:
            return f"{name} has no place in the house"
    return None if floor[there] < floor[here] else f"{there} is not below {here}"


def _forbidden_inside(module: str, target: str) -> str | None:
    """A method may use another and the solvers; who lowers graphs knows no method, and is known by none."""
    lowering = "sparsify.passes.lowering"
    if module.startswith(lowering) != target.startswith(lowering):
        return "lowering and methods do not know each other"
    return None


def _imported(path: Path) -> tuple[str, ...]:
    try:
        return _imports_of(path.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise AssertionError(f"{path}: {error.msg}") from error


@cache
def _imports_of(text: str) -> tuple[str, ...]:
    """Every name that a file of ``text`` imports: most files are as they were when the last test looked."""
    found: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
            found += (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            raise SyntaxError("a relative import; write the whole name")
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "import_module":
            found += (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))
    return tuple(found)


def _resolve(name: str, known: dict[str, Path], homes: dict[str, dict[str, str]]) -> str | None:
    if not (name == "sparsify" or name.startswith("sparsify.")):
        return None
    package, _, leaf = name.rpartition(".")
    if name not in known and leaf in homes.get(package, {}):
        return homes[package][leaf]
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name or None


@cache
def _lazy_names_of(text: str) -> dict[str, str]:
    """Names that a package's __init__ loads when they are asked for, with the module that holds each."""
    found: dict[str, str] = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for inner in node.body:
                if isinstance(inner, ast.ImportFrom) and inner.module is not None:
                    found |= {alias.name: inner.module for alias in inner.names}
    return found
