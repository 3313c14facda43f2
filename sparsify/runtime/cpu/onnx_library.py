"""The kernels as operators of onnxruntime: a shared library of the domain ``sparsify``. Imports no torch."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from sparsify.errors import BackendError, Refused
from sparsify.runtime.cache import UNSAFE, advice
from sparsify.runtime.cpu.build import OPERATORS
from sparsify.runtime.cpu.making import cached, is_whole, open_beside


@cache
def onnx_library() -> str:
    """The path of the library to register with onnxruntime, compiled into the cache folder where it is not there yet.

    Any program does so by the path: ``SessionOptions.register_custom_ops_library`` in Python, and its like elsewhere.

    Raises:
        BackendError: the installed package has none, and it cannot be compiled.
    """
    beside = Path(__file__).parent / OPERATORS.built
    found: str | Refused | None
    try:
        found = _path(open_beside(beside), beside)
    except OSError:
        found = None
    if found is None:
        found = cached(OPERATORS, _path)
    if isinstance(found, str):
        return found
    do = "Install a C++ compiler (g++ or clang++), or a wheel that holds it"
    raise BackendError(
        "sparsify's operators for onnxruntime",
        found=f"the library is not here: {found.reason}",
        do=advice(found.node) if found.code == UNSAFE else do,
    )


def _path(fd: int, path: Path) -> str | None:
    try:
        return str(path) if is_whole(OPERATORS, fd) else None
    finally:
        os.close(fd)
