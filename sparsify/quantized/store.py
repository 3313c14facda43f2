"""A quantized folder read as if it were dense: each tensor is dequantized when it is asked for, and none before."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import CheckpointError, first_line
from sparsify.files.checkpoint import Checkpoint
from sparsify.finite import check_finite
from sparsify.quantized.compressed_tensors.sparse import WithZeros
from sparsify.quantized.dense import Dense, Layout
from sparsify.quantized.restated import LEFT_OUT, dense_config

# Floats of 16 bits are the model's, and become what is asked for; of 32 those that its publisher kept so (a router's
# corrections), which nothing rounds.
_HALVES = (torch.float16, torch.bfloat16)


class QuantizedStore:
    """The tensors of a quantized folder under the names and shapes of the dense model.

    Args:
        checkpoint: the files; what its ledger says of bytes is held against them, of finiteness against dense tensors.
        to: what dequantized weights are given in, and all other floats of 16 bits.

    Raises:
        CheckpointError: two tensors of one dense name.
    """

    # Files that say how weights are quantized.
    left_out = LEFT_OUT

    def __init__(self, checkpoint: Checkpoint | WithZeros, layout: Layout, to: torch.dtype) -> None:
        self.checkpoint, self.layout, self.to, self.ledger = checkpoint, layout, to, checkpoint.ledger
        checkpoint.ledger = replace(checkpoint.ledger, finite=False)
        home = {stored: name for name, dense in layout.dense.items() for stored in dense.parts.values()}
        names = [home.get(stored, stored) for stored in checkpoint.names() if stored not in layout.beside]
        self._names = list(dict.fromkeys(names))
        if clash := next((n for n in layout.dense if n in set(checkpoint.names()) and n not in home), None):
            raise CheckpointError(
                f"quantized weight {clash}",
                found="a tensor of that name beside the parts of it",
                do="Fetch the folder again",
            )

    def names(self) -> Iterable[str]:
        return self._names

    def shape(self, name: str) -> torch.Size:
        dense = self.layout.dense.get(name)
        return self.checkpoint.shape(name) if dense is None else dense.shape

    def dtype(self, name: str) -> torch.dtype:
        return self.to if name in self.layout.dense else self._kept(self.checkpoint.dtype(name))

    def read(self, name: str) -> Tensor:
        """The dense tensor ``name``.

        Raises:
            CheckpointError: a part is not what the ledger says, or the dense tensor not finite where it has to be.
        """
        dense = self.layout.dense.get(name)
        if dense is None:
            tensor = self.checkpoint.read(name)
            tensor = tensor.to(self._kept(tensor.dtype))
        else:
            tensor = self._dequantized(name, dense)
        if self.ledger.finite:
            check_finite(name, tensor, str(self.ledger.folder))
        return tensor

    def write(self, name: str, tensor: Tensor) -> None:
        raise CheckpointError(f"writing {name}", found="a quantized folder", do="Write to an output")

    def dense_config(self, config: dict[str, Any]) -> dict[str, Any]:
        return dense_config(config, self.to)

    @property
    def quantization(self) -> dict[str, Any]:
        """What the manifest says of the source: its format, the dtype it is read in, and bytes stored and dense."""
        return {
            "method": self.layout.method,
            "dtype": str(self.to).removeprefix("torch."),
            "stored_bytes": self.checkpoint.nbytes(),
            "dense_bytes": sum(math.prod(self.shape(n)) * self.dtype(n).itemsize for n in self._names),
        }

    def _kept(self, stored: torch.dtype) -> torch.dtype:
        return self.to if stored in _HALVES else stored

    def _dequantized(self, name: str, dense: Dense) -> Tensor:
        parts = {role: self.checkpoint.read(stored) for role, stored in dense.parts.items()}
        return made(name, parts, dense, self.to)


def made(name: str, parts: Mapping[str, Tensor], dense: Dense, to: torch.dtype) -> Tensor:
    """The dense tensor ``name`` of its parts.

    Raises:
        CheckpointError: the format's library fails on them, or makes another shape of them.
    """
    do = "The file is damaged, or written otherwise than its format says: fetch it again"
    try:
        tensor = dense.make(parts, to)
    except CheckpointError as error:
        raise error.asking(f"dequantizing {name}") from error
    except Exception as error:  # libraries raise whatever they like of what they are given
        raise CheckpointError(
            f"dequantizing {name}", found=f"it fails ({type(error).__name__}: {first_line(error)})", do=do
        ) from error
    if tensor.shape != dense.shape:
        raise CheckpointError(
            f"dequantizing {name}", found=f"{list(tensor.shape)} came of it, not {list(dense.shape)}", do=do
        )
    return tensor.to(to).contiguous()
