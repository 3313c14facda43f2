"""List every ``raise`` of ours that no test reaches, from a coverage file of the quick tests; fail where one is not
justified below.

    coverage run -m pytest -m "not slow" && coverage combine && coverage json -o FILE.json
    python tools/unreached_raises.py FILE.json

``make raises`` does all three. A ``raise NotImplementedError`` of an abstract method is no refusal, and is left out.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("sparsify", "passes", "backends")

# "file function": why no quick test can or need reach what it raises. One that is reached is told, and must go.
JUSTIFIED: dict[str, str] = {
    "sparsify/data/sources.py _parquet": "today's pyarrow refuses a missing column itself, older ones do not",
    "sparsify/runtime/cpu/products.py linear_dense": "the kernel fails for want of memory alone",
    "sparsify/runtime/cpu/unpacking.py unpack_rows": "its callers have checked the shapes: want of memory alone",
}


@dataclass(frozen=True)
class Raise:
    """A ``raise`` statement: where it stands, and what it says."""

    path: str
    line: int
    function: str
    text: str

    @property
    def key(self) -> str:
        return f"{self.path} {self.function}"


def raises(path: Path, root: Path = ROOT) -> Iterator[Raise]:
    """Every ``raise`` in a file but those of abstract methods, in order."""

    def walk(node: ast.AST, inside: tuple[str, ...]) -> Iterator[Raise]:
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if isinstance(child, ast.Raise) and "NotImplementedError" not in ast.unparse(child):
                name = ".".join(inside) or "module"
                yield Raise(str(path.relative_to(root)), child.lineno, name, said(child))
            yield from walk(child, (*inside, child.name) if named else inside)  # type: ignore[attr-defined]

    return walk(ast.parse(path.read_text(encoding="utf-8")), ())


def said(node: ast.Raise) -> str:
    """What was found, where the error says it, else the statement."""
    if isinstance(node.exc, ast.Call):
        for keyword in node.exc.keywords:
            if keyword.arg == "found":
                return ast.unparse(keyword.value)[:90]
    return ast.unparse(node)[:90]


def reached(report: Path) -> dict[str, set[int]]:
    """Lines that ran, by the end of the file's path that begins with one of our folders."""
    found: dict[str, set[int]] = {}
    for name, file in json.loads(report.read_text(encoding="utf-8"))["files"].items():
        parts = Path(name).parts
        at = next((i for i, part in enumerate(parts) if part in FOLDERS), None)
        if at is not None:
            found.setdefault("/".join(parts[at:]), set()).update(file["executed_lines"])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="what coverage json wrote")
    ran = reached(parser.parse_args().report)
    every = [r for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")) for r in raises(path)]
    missed = [r for r in every if r.line not in ran.get(r.path, set())]
    unjustified = [r for r in missed if r.key not in JUSTIFIED]
    for r in unjustified:
        print(f"{r.path}:{r.line} {r.function}: {r.text}")
    idle = sorted(JUSTIFIED.keys() - {r.key for r in missed})
    for key in idle:
        print(f"{key}: justified, and reached by now")
    print(f"{len(every)} raises, {len(missed)} unreached, {len(missed) - len(unjustified)} of those justified")
    return 1 if unjustified or idle else 0


if __name__ == "__main__":
    sys.exit(main())
