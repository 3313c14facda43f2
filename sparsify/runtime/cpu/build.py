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


def search_path() -> str:
    """``$PATH`` without words that mean the working directory, in which anybody's ``g++`` may lie."""
    return os.pathsep.join(filter(os.path.isabs, os.environ.get("PATH", os.defpath).split(os.pathsep)))


def find_compiler() -> list[str] | None:
    """The words that call a C++ compiler: ``$CXX``'s (``g++ -m64``, ``ccache g++``), or the first on the path."""
    own = os.environ.get("CXX", "").strip()
    if not own:
        known = (shutil.which(name, path=search_path()) for name in ("c++", "g++", "clang++"))
        return next(([found] for found in known if found), None)
    # A path with blanks in it is one word; so is what a shell could not read, and whoever calls it says so.
    try:
        words = [own] if shutil.which(own, path=search_path()) else shlex.split(own)
    except ValueError:
        words = [own]
    # It is called from another folder than this one.
    return [str(Path(word).absolute()) if os.sep in word and word[:1] != "-" else word for word in words]


def compile_command(compiler: Sequence[str], target: Path, extra: tuple[str, ...] = ()) -> list[str]:
    name = f'-DSPARSIFY_SOURCE="{source_hash()}"'
    sources = sorted(map(str, SOURCES.glob("*.cpp")))
    return [*compiler, *FLAGS, *_OPENMP, name, *extra, "-o", str(target), *sources]
