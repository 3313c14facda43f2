"""Compiled libraries in the user's cache folder: taken where they are whole, compiled where they are not there."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sparsify.errors import Refused, SpecError
from sparsify.import_path import environment
from sparsify.runtime.cache import UNSAFE, cache_folder, open_own, read_open, replace_own, sweep, workshop
from sparsify.runtime.cpu.build import Library, compile_command, find_compiler, search_path, source_hash
from sparsify.runtime.seal import sealed, unsealed

T = TypeVar("T")


def cached(library: Library, take: Callable[[int, Path], T | None]) -> T | Refused:
    """What ``take`` makes of the library in the cache folder, compiled now where it is not there or not the one.

    Args:
        take: given the open file, which it closes or keeps, and its path; None where it is not the one.

    Returns:
        Or why there is none; with the code ``UNSAFE`` where others may write to the folder.
    """
    try:
        # One home may serve machines of several kinds.
        target = cache_folder() / f"{library.name}-{source_hash(library)}-{os.uname().machine}.so"
        for made in (False, True):
            if made and (refused := _compile(library, target)):
                return refused
            fd = open_own(target)
            if not isinstance(fd, Refused):
                found = take(fd, target)
                if found is not None:
                    sweep(target.parent)
                    return found
            elif fd.code == UNSAFE:
                return fd
        return Refused(f"{target} is not what was compiled", str(target))
    except (OSError, SpecError) as error:
        return Refused(str(error))


def is_whole(library: Library, fd: int) -> bool:
    """Whether the open file is undamaged and names the sources of ``library``. Nothing of it has been run."""
    content = unsealed(read_open(fd))
    return content is not None and source_hash(library).encode() in content


def open_beside(path: Path) -> int:
    """A library that came with the package, open for reading.

    Raises:
        OSError: it is not there.
    """
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)


def _compile(library: Library, target: Path) -> Refused | None:
    """Put the library into the cache; or why not. Two processes may get here at once, and each renames a whole file.

    Raises:
        OSError: it cannot be written, or the compiler not be called.
    """
    compiler = find_compiler()
    if compiler is None:
        return Refused("not in the installed package, and no C++ compiler was found")
    with workshop(target.parent) as place:
        made = place / target.name
        # Empty words in what compilers are told by the environment mean the working directory: it is this one. Their
        # own temporary files go with it too.
        own = environment() | {"PATH": search_path(), "TMPDIR": str(place)}
        words = compile_command(compiler, made, library=library)
        done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=place, env=own)
        if done.returncode:
            error = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
            return Refused(f"{compiler} failed: {error[:200]}", str(target))
        return replace_own(target, sealed(made.read_bytes()))
