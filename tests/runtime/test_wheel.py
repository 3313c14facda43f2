"""What is installed holds the kernels: those of CPUs compiled, those of GPUs as sources."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sparsify.runtime.cpu.build import find_compiler, source_hash
from sparsify.runtime.cpu.native import BUILT, NativeLibrary

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_an_installed_package_has_its_kernels(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    if find_compiler() is None:
        pytest.skip("no C++ compiler here")
    source, place = tmp_path / "source", tmp_path / "installed"
    for name in ("sparsify", "passes", "backends"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", f"{BUILT}*"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*words, "--target", place, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    runtime = place / "sparsify" / "runtime"
    (library,) = (runtime / "cpu").glob(f"{BUILT}*")
    assert NativeLibrary(library).source == source_hash()
    for kind in ("cpu", "cuda"):
        kernels = ROOT / "sparsify" / "runtime" / kind / "kernels"
        assert {p.name for p in (runtime / kind / "kernels").iterdir()} == {p.name for p in kernels.iterdir()}
    installed = {p.relative_to(place / "sparsify") for p in (place / "sparsify").rglob("*.py")}
    for name, inside in (("sparsify", "."), ("passes", "passes"), ("backends", "backends")):
        mine = {inside / p.relative_to(ROOT / name) for p in (ROOT / name).rglob("*.py")}
        assert mine <= installed, sorted(mine - installed)[:3]
