"""How the CPU kernels are compiled: for a wheel (setup.py), and where a wheel has none. Imports nothing heavy."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).parent / "kernels"
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden"]
_OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]


class Library(NamedTuple):
    """One shared library: its name, the folders of ``SOURCES`` whose files it is made of, and what is compiled."""

    name: str
    folders: tuple[str, ...]
    files: tuple[str, ...]
    flags: tuple[str, ...]

    @property
    def built(self) -> str:
        """What a wheel's build calls it."""
        return f"_{self.name}.so"


KERNELS = Library("cpu", (".",), ("attend.cpp", "few.cpp", "kernels.cpp"), tuple(_OPENMP))
# The same kernels behind onnxruntime's interface: threads are its own.
OPERATORS = Library("onnx", (".", "onnx"), ("few.cpp", "kernels.cpp", "onnx/operators.cpp"), ())


def source_hash(library: Library = KERNELS) -> str:
    """What a library must have been built from to be the one of this package."""
    files = [path for folder in library.folders for path in sorted((SOURCES / folder).iterdir())]
    text = b"".join(path.read_bytes() for path in files if path.suffix in (".h", ".cpp"))
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


def compile_command(
    compiler: Sequence[str], target: Path, extra: tuple[str, ...] = (), library: Library = KERNELS
) -> list[str]:
    name = f'-DSPARSIFY_SOURCE="{source_hash(library)}"'
    sources = [str(SOURCES / file) for file in library.files]
    return [*compiler, *FLAGS, *library.flags, name, *extra, "-o", str(target), *sources]
