"""What a format says of a file: which dense tensors are in it, of which parts, and how one is made of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsify.errors import CheckpointError

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SUPPORTED = (
    "fp8 (in blocks, or with a scale a tensor or row), mxfp4, compressed-tensors (sparse too), ModelOpt FP8, GPTQ, AWQ "
    "(gemm), bitsandbytes and GGUF files"
)
_INSTALL = 'pip install "sparsify-fx[quantized]"'


class Tensors(Protocol):
    """The tensors of a folder as they are stored."""

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> torch.Size: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class Dense:
    """A dense tensor that is stored in parts.

    Attributes:
        parts: what each is to the format -> its name in the file. shape: of the dense tensor.
        make: the parts, and the dtype that the dense tensor is to have -> the dense tensor.
    """

    parts: Mapping[str, str]
    shape: torch.Size
    make: Callable[[Mapping[str, Tensor], torch.dtype], Tensor]


@dataclass(frozen=True)
class Layout:
    """What is in a file.

    Attributes:
        method: the format, for people and for the manifest. dense: dense name -> how it is stored; what is not in here
            lies there as it is. beside: tensors that are no part of a dense one (scales of activations).
        dtype: of the dense tensors, where they lost nothing; None of what is quantized, which may be read in any.
    """

    method: str
    dense: Mapping[str, Dense]
    beside: frozenset[str] = frozenset()
    dtype: torch.dtype | None = None


def part(
    tensors: Tensors,
    known: Collection[str],
    name: str,
    of: str,
    dtypes: Sequence[torch.dtype],
    shapes: Sequence[Sequence[int]] | None = None,
) -> str:
    """``name``, if the file holds it in one of ``dtypes`` and one of ``shapes`` (None: any).

    Raises:
        CheckpointError: it does not.
    """
    asked = f"quantized weight {of}"
    if name not in known:
        raise CheckpointError(asked, found=f"{name}, which it is read with, is not there", do="Fetch the folder again")
    shape, dtype = tuple(tensors.shape(name)), tensors.dtype(name)
    if dtype not in dtypes or (shapes is not None and shape not in {tuple(s) for s in shapes}):
        wanted = " or ".join(str(list(s)) for s in shapes) if shapes is not None else "any shape"
        raise CheckpointError(
            asked,
            found=f"{name} is {list(shape)} of {dtype} where {wanted} of {' or '.join(map(str, dtypes))} belongs",
            do="config.json and the weights do not belong together: fetch the folder again",
        )
    return name


def refused(what: str, found: str, do: str = "") -> CheckpointError:
    """What is raised where a model is quantized in a way that is not read here."""
    known = f"Read are {SUPPORTED}; prune the model from before it was quantized, or dequantize it with its own library"
    return CheckpointError(what, found=f"a quantized checkpoint: {found}", do=do or known)


def number(config: Mapping[str, Any], key: str, known: Collection[int], asked: str) -> int:
    """The whole number that a quantization config has under ``key``.

    Raises:
        CheckpointError: it is none of ``known``.
    """
    value = config.get(key)
    if type(value) is not int or value not in known:
        raise refused(asked, f"{key} {value!r}, and what is read here has {', '.join(map(str, sorted(known)))}")
    return value


def library(name: str, package: str, asked: str) -> Any:
    """The module ``name`` of a format's own library.

    Raises:
        CheckpointError: it is not installed, or does not load.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CheckpointError(
            asked, found=f"the library that reads it, {package}, does not load here ({error})", do=f"Run {_INSTALL}"
        ) from error


def scaled(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` [..., rows, columns] times ``scale``, which broadcasts to it, in float32 and rounded once."""
    return weight.to(torch.float32).mul_(scale.to(torch.float32)).to(dtype)
