"""The house: which room imports which. The contract is in tests/support/layers.py and docs/architecture.md."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from support.layers import PACKAGES, behind, circles, imports, modules, violations

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def edges() -> dict[str, set[str]]:
    return imports(ROOT)


def test_every_import_goes_down() -> None:
    assert violations(ROOT) == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert circles(ROOT) == []


PLANTED = {
    "at the top": ("sparsify/ir/program.py", "from sparsify.frontend.source import Source\n"),
    "in a function": ("sparsify/ir/weights.py", "def f():\n    from sparsify.prune.engine import Engine\n"),
    "for types alone": ("sparsify/files/staging.py", "if TYPE_CHECKING:\n    from sparsify.data import batches\n"),
    "as a module": ("sparsify/runtime/layout.py", "import sparsify.method.pattern\n"),
    "a neighbour": ("sparsify/analysis/flow.py", "from sparsify.frontend.capture import capture\n"),
    "by a lazy name": ("sparsify/calibration/rows.py", "from sparsify import compile\n"),
    "by import_module": ("sparsify/ir/store.py", "import_module('sparsify.backends.hf.backend')\n"),
    "a pass the core": ("passes/wanda.py", "from sparsify.ir.program import Program\n"),
    "a pass a backend": ("passes/magnitude.py", "from sparsify.backends.hf.backend import HuggingFace\n"),
    "a method lowering": ("passes/wanda.py", "from sparsify.passes.lowering.lower_sparse import LowerSparse\n"),
    "the core a pass": ("sparsify/prune/turn.py", "from sparsify.passes.wanda import Wanda\n"),
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_import_is_seen(what: str, tmp_path: Path) -> None:
    for folder in PACKAGES:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "kernels"))
    file, line = PLANTED[what]
    assert violations(tmp_path) == []
    (tmp_path / file).write_text((tmp_path / file).read_text() + "\n" + line)
    assert len(violations(tmp_path)) == 1


def test_a_planted_circle_is_seen(tmp_path: Path) -> None:
    for folder in PACKAGES:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "kernels"))
    # Inside one room, where every import is allowed.
    file = tmp_path / "sparsify" / "method" / "pattern.py"
    file.write_text(file.read_text() + "\nfrom sparsify.method.selection import select\n")
    assert circles(tmp_path) == ["sparsify.method.pattern", "sparsify.method.selection"]


@pytest.mark.parametrize(
    ("module", "most"),
    [
        ("sparsify.passes.magnitude", 20),
        ("sparsify.method.spec", 9),
        ("sparsify.ir.program", 8),
        ("sparsify.analysis.linear", 14),
    ],
)
def test_little_stands_behind_a_module(module: str, most: int, edges: dict[str, set[str]]) -> None:
    assert len(behind(module, edges)) <= most
    # The same of what is really loaded, packages on the way included.
    code = f"import sys, {module}; print(*[m for m in sys.modules if m.split('.')[0] == 'sparsify'])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert module in loaded and len(loaded) <= most, sorted(loaded)
    assert not [name for name in loaded if name.startswith("sparsify.runtime")]


def test_a_method_brings_no_other_method_and_no_gpu(edges: dict[str, set[str]]) -> None:
    for name in ("wanda", "sparsegpt", "llm_pruner"):
        rooms = {m.split(".")[1] for m in behind(f"sparsify.passes.{name}", edges)}
        assert rooms <= {"passes", "method", "errors", "tensors"}, (name, rooms)


def test_files_and_folders_are_small() -> None:
    lines = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in modules(ROOT).values()}
    assert not {p: n for p, n in lines.items() if n > 400}
    assert statistics.median(lines.values()) <= 130
    folders = Counter(str(Path(p).parent) for p in lines)
    assert not {folder: n for folder, n in folders.items() if n > 14}


def test_every_package_is_listed_for_the_wheel() -> None:
    listed = (ROOT / "pyproject.toml").read_text()
    for name, path in modules(ROOT).items():
        if path.name == "__init__.py":
            assert f'    "{name}",' in listed, name


def test_the_old_paths_are_gone() -> None:
    core = (
        "program",
        "weights",
        "engine",
        "packed",
        "cuda",
        "tune",
        "calibration.data",
        "analysis.region",
        "passes.gram",
    )
    old = [f"sparsify.{name}" for name in core]
    known = modules(ROOT)
    assert not [name for name in old if name in known or any(m.startswith(f"{name}.") for m in known)]
