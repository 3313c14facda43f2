"""Compiles the CPU kernels into the wheel; all else is in pyproject.toml.

The library is plain C behind ctypes: a wheel fits every Python 3 and every torch. Where there is no compiler the wheel
is built without it, and the kernels are compiled when they are first used.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent


def compile_kernels(folder: Path) -> None:
    """Compile ``sparsify/runtime/cpu/kernels`` into ``folder``; a line says why, where that fails."""
    build, seal = _ours("cpu/build.py"), _ours("seal.py")
    for library in (build.KERNELS, build.OPERATORS):
        compile_library(build, seal, library, folder / library.built)


def compile_library(build: ModuleType, seal: ModuleType, library: Any, target: Path) -> None:
    compiler = build.find_compiler()
    if compiler is None:
        print(f"sparsify: no C++ compiler; the wheel is built without {target.name}", file=sys.stderr)
        return
    words = build.compile_command(compiler, target, library=library)
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"sparsify: {compiler} failed, the wheel is built without {target.name}:\n{done.stderr}", file=sys.stderr)
        return
    # Whoever strips or patches the library seals it after that: without its seal it is not loaded.
    target.write_bytes(seal.sealed(target.read_bytes()))


def _ours(file: str) -> ModuleType:
    """A module of the runtime, loaded by its path: the package itself cannot be imported while it is built."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, HERE / "sparsify" / "runtime" / file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildWithKernels(build_py):
    """Python files as ever, and the library beside them."""

    def run(self) -> None:
        super().run()
        # A checkout compiles into the cache folder instead: its sources change.
        if not self.editable_mode:
            folder = Path(self.build_lib) / "sparsify" / "runtime" / "cpu"
            folder.mkdir(parents=True, exist_ok=True)
            compile_kernels(folder)


class PlatformWheel(bdist_wheel):
    """One wheel per platform, for every Python 3."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"):
            self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if not self.root_is_pure else (python, abi, platform)


setup(cmdclass={"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel})
