"""The CUDA kernels' own source on this CPU: compiled with ``emulator.h`` in the place of ``device.h``."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparsify.runtime.cpu.build import find_compiler
from sparsify.runtime.cuda.integers import grid_in
from sparsify.runtime.cuda.variants import Arguments, Launch, Variant, add_splits_launch, unpack_launch

HERE = Path(__file__).parent
KERNELS = HERE.parent.parent / "sparsify" / "runtime" / "cuda" / "kernels"
TYPES = {torch.bfloat16: "BFloat16", torch.float16: "Float16"}


@cache
def library(dtype: torch.dtype, more: str = "") -> ctypes.CDLL:
    """The kernels of ``dtype``, and those of ``more``, the text of a header beside them."""
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    # Named for what it is made of: the next process that wants it finds it.
    sources = [*sorted(KERNELS.iterdir()), *sorted(HERE.glob("emulator*"))]
    made_of = hashlib.sha256(b"".join([*(p.read_bytes() for p in sources), more.encode()])).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"sparsify-emulator-{os.getuid()}" / f"{TYPES[dtype]}-{made_of}.so"
    if target.exists():
        return ctypes.CDLL(str(target))
    target.parent.mkdir(mode=0o700, exist_ok=True)
    words = [*compiler, "-O2", "-std=c++17", "-fPIC", "-shared", f"-DSPARSIFY_TYPE={TYPES[dtype]}", f"-I{KERNELS}"]
    made = target.with_suffix(f".{os.getpid()}")
    words += [f"-I{HERE}", "-o", str(made), "-x", "c++", "-"]
    source = f'#include "emulator.cpp"\n{more}'
    done = subprocess.run(words, input=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made.replace(target)
    return ctypes.CDLL(str(target))


class EmulatorError(Exception):
    """What a kernel did that no kernel may do."""


def run(
    launch: Launch,
    arguments: Arguments,
    dtype: torch.dtype,
    read: list[Tensor],
    written: list[Tensor],
    *,
    backwards: bool = False,
    more: str = "",
) -> None:
    """Launch a kernel that may touch ``read`` and ``written``.

    Raises:
        EmulatorError: it touched something else, or did what else the emulator knows to be wrong.
    """
    code = library(dtype, more)
    buffers = [*read, *written]
    pointers = (ctypes.c_void_p * len(buffers))(*(b.data_ptr() for b in buffers))
    sizes = (ctypes.c_uint64 * len(buffers))(*(b.nbytes for b in buffers))
    writable = (ctypes.c_int * len(buffers))(*([0] * len(read) + [1] * len(written)))
    error = ctypes.create_string_buffer(256)
    function = ctypes.cast(getattr(code, launch.kernel), ctypes.c_void_p)
    failed = code.emulate(
        function,
        (ctypes.c_int * 3)(*launch.grid),
        launch.threads,
        launch.cluster,
        ctypes.c_uint64(launch.shared),
        ctypes.byref(arguments),
        pointers,
        sizes,
        writable,
        len(buffers),
        int(backwards),
        error,
        256,
    )
    if failed:
        raise EmulatorError(error.value.decode())


# So few that blocks which stay have several groups of rows each.
MULTIPROCESSORS = 1


def linear(
    variant: Variant, x: Tensor, fragments: Tensor, rows: int, bias: Tensor | None = None, *, backwards: bool = False
) -> Tensor:
    """y = x Wᵀ + b, poisoned before it is written."""
    tokens, columns = x.shape
    summed = variant.kind == "tiled" and variant.splits > 1
    y = torch.full((tokens, rows), float("nan"), dtype=x.dtype)
    partial = torch.full((variant.splits if summed else 0, tokens, rows), float("nan"))
    arguments = Arguments(
        fragments.data_ptr(),
        x.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        partial.data_ptr(),
        tokens,
        rows,
        columns,
        fragments.shape[1],
        variant.splits,
        int(variant.early),
        0,
        0,
    )
    read = [fragments, x, *([] if bias is None else [bias])]
    run(variant.launch(tokens, rows, MULTIPROCESSORS), arguments, x.dtype, read, [y, partial], backwards=backwards)
    if summed:
        run(add_splits_launch(tokens, rows), arguments, x.dtype, [*read, partial], [y], backwards=backwards)
    return y


def unpacked(fragments: Tensor, dtype: torch.dtype, first: int, count: int, columns: int) -> Tensor:
    y, grid = torch.full((count, columns), float("nan"), dtype=dtype), grid_in(fragments)
    place = (fragments.data_ptr(), None, None, y.data_ptr(), None, 0, 0, columns, fragments.shape[1], 1, 0)
    arguments = Arguments(*place, first, count, 0 if grid is None else grid.scales)
    run(unpack_launch(count, columns, grid), arguments, dtype, [fragments], [y])
    return y
