"""The compiled CPU kernels: found beside this file, or else compiled once into the user's cache folder.

They are a plain C library over pointers, loaded with ctypes: no build of torch or Python is tied to it, and its OpenMP
threads are torch's own where both name the same libgomp.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sparsify.errors import Refused, SpecError
from sparsify.runtime.cache import UNSAFE, advice
from sparsify.runtime.cpu.build import KERNELS, source_hash
from sparsify.runtime.cpu.making import cached, is_whole, open_beside

# What a wheel's build calls the library.
BUILT = KERNELS.built
ISAS = ("scalar", "avx2", "avx512")


class NativeLibrary:
    """The functions of one compiled library; see ``kernels/*.cpp`` for their arguments.

    Raises:
        OSError: it does not load. ``AttributeError``: it is another library.
    """

    def __init__(self, path: Path, fd: int | None = None) -> None:
        """Args:
        fd: the open file, where that is what is loaded, whatever is at ``path`` by now. It stays open: the loader
            tells libraries apart by their names, and this is one.
        """
        self.path = path
        by_number = Path(f"/proc/self/fd/{fd}")
        library = ctypes.CDLL(str(by_number if fd is not None and by_number.exists() else path))
        number, pointer, small = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
        library.sparsify_source.restype = ctypes.c_char_p
        self.source = library.sparsify_source().decode()
        self.best_isa: int = library.sparsify_isa()
        self.has_tiles = bool(library.sparsify_tiles())
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
        few = [small, small, small, small, number, *tensor * 4]
        self.linear_few = library.sparsify_linear_few_of
        self.linear_few.argtypes = [small, pointer, *tensor * 2, pointer, *[number] * 3, small, small]
        self.attend = library.sparsify_attend
        self.attend.argtypes = [
            small,
            small,
            *[pointer] * 4,
            small,
            pointer,
            *[number] * 6,
            ctypes.c_float,
            pointer,
            small,
        ]
        self.unpack_few = library.sparsify_unpack_few
        self.unpack_few.argtypes = [*few, *tensor, *[number] * 4, small]


@cache
def library() -> NativeLibrary | None:
    """The kernels of this machine, or None, with one warning, where there are none and no compiler makes them."""
    built: NativeLibrary | Refused | None = _packaged()
    if built is None:
        built = cached(KERNELS, _load)
    if isinstance(built, NativeLibrary):
        return built
    do = "Install a C++ compiler (g++ or clang++), or a wheel that holds the kernels"
    warnings.warn(
        f"sparsify's CPU kernels are not here ({built.reason}); packed weights are unpacked for every product, which "
        f"is slow. {advice(built.node) if built.code == UNSAFE else do}",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


def _packaged() -> NativeLibrary | None:
    """The library beside this file, which is trusted as this file is."""
    path = Path(__file__).parent / BUILT
    try:
        return _load(open_beside(path), path)
    except OSError:
        return None


def _load(fd: int, path: Path) -> NativeLibrary | None:
    """The library in the open file, which is closed where this returns None: it is damaged, or of other sources.

    Loading runs code and reads the file as memory, so both are known before.

    Raises:
        OSError: it is whole, and does not load here.
    """
    found = None
    try:
        if is_whole(KERNELS, fd):
            loaded = NativeLibrary(path, fd)
            # What only mentions the sources stays open: its name must not become another's.
            fd, found = -1, loaded if loaded.source == source_hash() else None
    except AttributeError:
        fd = -1
    finally:
        if fd >= 0:
            os.close(fd)
    return found


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


def any_number_24(dtype: torch.dtype) -> bool:
    """Whether the kernels multiply any number of tokens with packed24 at least as fast as torch does unpacked panels:
    with AVX-512, unless torch has tiles (AMX) for that dtype."""
    found = library()
    return found is not None and isa() == 2 and not (found.has_tiles and dtype is torch.bfloat16)


KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
