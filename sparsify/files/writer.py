"""Safetensors files whose tensors are written one at a time: the library's writer holds all of them at once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.context import counted
from sparsify.files.checkpoint import DTYPES, INDEX, WEIGHTS, Checkpoint

# What transformers cuts its files at.
SHARD = 5 * 10**9
# Bytes of one tensor that a folder of ours may speak of.
MAX_TENSOR = 1 << 44
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# The order of the safetensors library: dtypes of wide elements first, then names.
_ORDER = ("U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8")

FileLayout = Mapping[str, tuple[torch.dtype, Sequence[int]]]


def lay_out(folder: Path, tensors: FileLayout, shard: int = SHARD) -> Checkpoint:
    """Make the weight files of ``folder`` for ``tensors``, zeros in them, cut like transformers' own.

    Args:
        tensors: name to (dtype, shape). ``shard``: bytes at which a new file begins.

    Returns:
        The checkpoint, to be written tensor by tensor.
    """
    files: list[dict[str, tuple[torch.dtype, Sequence[int]]]] = [{}]
    filled = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        if files[-1] and filled + size > shard:
            files.append({})
            filled = 0
        files[-1][name] = (dtype, shape)
        filled += size
    if len(files) == 1:
        return lay_out_files(folder, {WEIGHTS: files[0]})
    names = [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    return lay_out_files(folder, dict(zip(names, files, strict=True)))


def write_all(folder: Path, tensors: FileLayout, read: Callable[[str], Tensor], shard: int = SHARD) -> Checkpoint:
    """The weight files of ``folder`` with ``tensors`` in them, of which never more than one is in memory: those that
    the safetensors library would write.

    Args:
        read: gives a tensor by its name. ``shard``: as for :func:`lay_out`.
    """
    ranks = {kind: rank for rank, kind in enumerate(_ORDER)}

    def rank(name: str) -> tuple[int, str]:
        return ranks.get(_NAMES[tensors[name][0]], len(ranks)), name

    if nbytes(tensors) <= shard:
        tensors = {name: tensors[name] for name in sorted(tensors, key=rank)}
    made = lay_out(folder, tensors, shard)
    for name in counted("writing", tensors):
        made.write(name, read(name))
    return made


def lay_out_files(folder: Path, files: Mapping[str, FileLayout]) -> Checkpoint:
    """The same with the files given: file name to its tensors; an index is written where it needs one."""
    for file, tensors in files.items():
        _make_file(folder / file, tensors)
    if list(files) != [WEIGHTS]:
        weight_map = {name: file for file, tensors in files.items() for name in tensors}
        total = sum(math.prod(s) * d.itemsize for tensors in files.values() for d, s in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return Checkpoint(folder, writable=True)


def layout_of(checkpoint: Checkpoint) -> dict[str, dict[str, tuple[torch.dtype, Sequence[int]]]]:
    """The files of a checkpoint as :func:`lay_out_files` takes them."""
    files: dict[str, dict[str, tuple[torch.dtype, Sequence[int]]]] = {}
    for name in checkpoint.names():
        file = checkpoint.span(name)[0].name
        files.setdefault(file, {})[name] = (checkpoint.dtype(name), list(checkpoint.shape(name)))
    return files


def layout_to_json(files: Mapping[str, FileLayout]) -> dict[str, dict[str, list[object]]]:
    return {f: {n: [_NAMES[d], list(s)] for n, (d, s) in tensors.items()} for f, tensors in files.items()}


def layout_from_json(content: Mapping[str, Mapping[str, Sequence[Any]]]) -> dict[str, FileLayout]:
    """Undo :func:`layout_to_json`.

    Raises:
        KeyError, TypeError, ValueError: content of another form, or out of bounds.
    """
    files: dict[str, FileLayout] = {}
    for file, tensors in content.items():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"file name {file!r}")
        for name, (dtype, shape) in tensors.items():
            sizes = all(type(size) is int and size >= 0 for size in shape)
            if not sizes or math.prod(shape) * DTYPES[dtype].itemsize > MAX_TENSOR:
                raise ValueError(f"{name!r} of the shape {shape}")
            name.encode("utf-8")
        files[file] = {n: (DTYPES[d], list(s)) for n, (d, s) in tensors.items()}
    return files


def nbytes(tensors: FileLayout) -> int:
    """The bytes that they take, headers left out."""
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in tensors.values())


def _make_file(path: Path, tensors: FileLayout) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
