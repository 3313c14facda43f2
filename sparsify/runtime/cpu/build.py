"""How the CPU kernels are compiled: for a wheel (setup.py), and where a wheel has none. Imports nothing heavy."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

SOURCES = Path(__file__).parent / "kernels"
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden"]
_OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]


def source_hash() -> str:
    """What a library must have been built from to be the one of this package."""
    text = b"".join(path.read_bytes() for path in sorted(SOURCES.iterdir()) if path.suffix in (".h", ".cpp"))
    return hashlib.sha256(text).hexdigest()[:16]


def find_compiler() -> list[str] | None:
    """The words that call a C++ compiler: ``$CXX``'s (``g++ -m64``, ``ccache g++``), or the first on the path."""
    own = os.environ.get("CXX", "").strip()
    if not own:
        return next(([c] for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    # A path with blanks in it is one word; so is what a shell could not read, and whoever calls it says so.
    try:
        return [own] if shutil.which(own) else shlex.split(own)
    except ValueError:
        return [own]


def compile_command(compiler: Sequence[str], target: Path, extra: tuple[str, ...] = ()) -> list[str]:
    name = f'-DSPARSIFY_SOURCE="{source_hash()}"'
    return [*compiler, *FLAGS, *_OPENMP, name, *extra, "-o", str(target), str(SOURCES / "kernels.cpp")]
