"""The compiled CPU kernels: found beside this file, or else compiled once into the user's cache folder.

They are a plain C library over pointers, loaded with ctypes: no build of torch or Python is tied to it, and its OpenMP
threads are torch's own where both name the same libgomp.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sparsify.errors import Refused, SpecError
from sparsify.runtime.cache import cache_folder
from sparsify.runtime.cpu.build import compile_command, find_compiler, source_hash

# What a wheel's build calls the library.
BUILT = "_cpu"
ISAS = ("scalar", "avx2", "avx512")


class NativeLibrary:
    """The functions of one compiled library; see ``cpu/kernels.cpp`` for their arguments.

    Raises:
        OSError: it does not load. ``AttributeError``: it is another library.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        library = ctypes.CDLL(str(path))
        number, pointer, small = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
        library.sparsify_source.restype = ctypes.c_char_p
        self.source = library.sparsify_source().decode()
        self.best_isa: int = library.sparsify_isa()
        tensor: list[Any] = [pointer, number]  # where it lies, and how long it is
        self.linear = library.sparsify_linear
        self.linear.argtypes = [small, small, *tensor * 5, pointer, *[number] * 3, small]
        self.linear_dense = library.sparsify_linear_dense
        self.linear_dense.argtypes = [small, small, *tensor * 3, pointer, number, number, small]
        self.row_starts = library.sparsify_row_starts
        self.row_starts.argtypes = [small, *tensor, number, number, pointer]
        self.check_24 = library.sparsify_check_24
        self.check_24.argtypes = tensor
        self.unpack = library.sparsify_unpack
        self.unpack.argtypes = [small, small, *tensor * 4, *[number] * 4, small]


@cache
def library() -> NativeLibrary | None:
    """The kernels of this machine, or None, with one warning, where there are none and no compiler makes them."""
    for path in sorted(Path(__file__).parent.glob(f"{BUILT}*")):
        try:
            found = NativeLibrary(path)
        except (OSError, AttributeError):
            continue
        # In a checkout the sources may be newer than what was built with them.
        if found.source == source_hash():
            return found
    built = _cached()
    if isinstance(built, NativeLibrary):
        return built
    warnings.warn(
        f"sparsify's CPU kernels are not here ({built.reason}); packed weights are unpacked for every product, which "
        "is slow. Install a C++ compiler (g++ or clang++), or a wheel that holds the kernels",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


def _cached() -> NativeLibrary | Refused:
    """The library in the cache folder, compiled now where it is not there yet; or why not."""
    compiler = find_compiler()
    target = cache_folder() / f"cpu-{source_hash()}.so"
    try:
        if target.exists():
            return NativeLibrary(target)
        if compiler is None:
            return Refused("not in the installed package, and no C++ compiler was found")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            done = subprocess.run(compile_command(compiler, made), capture_output=True, text=True, check=False)
            if done.returncode:
                error = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
                return Refused(f"{compiler} failed: {error[:200]}", str(target))
            # Two processes may get here at once; each renames a whole file.
            made.replace(target)
        return NativeLibrary(target)
    except (OSError, AttributeError) as error:
        return Refused(f"{target}: {error}", str(target))


@cache
def isa() -> int:
    """The instruction set in use: this machine's best, or a lower one that ``$SPARSIFY_CPU_ISA`` names.

    Raises:
        SpecError: that names none, or one that this machine has not.
    """
    found = library()
    best = found.best_isa if found is not None else 0
    wanted = os.environ.get("SPARSIFY_CPU_ISA")
    if wanted is None:
        return best
    if wanted not in ISAS or ISAS.index(wanted) > best:
        raise SpecError(
            f"SPARSIFY_CPU_ISA={wanted}",
            found="no such instruction set" if wanted not in ISAS else f"this machine has {ISAS[best]}",
            do=f"Take {', '.join(ISAS[: best + 1])}",
        )
    return ISAS.index(wanted)


KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
