"""How the CPU kernels are compiled: for a wheel (setup.py), and where a wheel has none. Imports nothing heavy."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path

SOURCES = Path(__file__).parent / "kernels"
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden"]
_OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]


def source_hash() -> str:
    """What a library must have been built from to be the one of this package."""
    text = b"".join(path.read_bytes() for path in sorted(SOURCES.iterdir()) if path.suffix in (".h", ".cpp"))
    return hashlib.sha256(text).hexdigest()[:16]


def find_compiler() -> str | None:
    """``$CXX``, or the first C++ compiler on the path."""
    return os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)


def compile_command(compiler: str, target: Path, extra: tuple[str, ...] = ()) -> list[str]:
    name = f'-DSPARSIFY_SOURCE="{source_hash()}"'
    return [compiler, *FLAGS, *_OPENMP, name, *extra, "-o", str(target), str(SOURCES / "kernels.cpp")]
