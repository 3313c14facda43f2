"""MXFP4 (gpt-oss): experts stacked in ``X_blocks``, 16 bytes of two numbers each, beside ``X_scales``, their exponents.

transformers' ``convert_moe_packed_tensors`` makes one such stack dense, on a CPU too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsify.quantized.dense import Dense, Layout, Tensors, part, refused

METHOD = "mxfp4"
_BLOCKS, _SCALES = "_blocks", "_scales"
_BYTES = 16  # of a block: 32 numbers of four bits


def find(tensors: Tensors, config: Mapping[str, Any], where: str) -> Layout:
    """Raises:
    CheckpointError: blocks without scales, or of another shape.
    """
    known, dense = set(tensors.names()), {}
    for blocks in (n for n in known if n.endswith(_BLOCKS) and tensors.dtype(n) == torch.uint8):
        name, shape = blocks.removesuffix(_BLOCKS), tuple(tensors.shape(blocks))
        if len(shape) != 4 or shape[-1] != _BYTES:
            raise refused(where, f"{blocks} of the shape {list(shape)}, where [experts, rows, blocks, 16] belongs")
        scales = part(tensors, known, name + _SCALES, name, (torch.uint8,), [shape[:-1]])
        experts, rows, count, _ = shape
        # Stored as [out, in]; the model has its experts the other way round.
        dense[name] = Dense(
            {"blocks": blocks, "scales": scales}, torch.Size((experts, count * 2 * _BYTES, rows)), _make
        )
    return Layout(METHOD, dense)


def _make(parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    # An expert at a time: what it makes on the way is many times as large as what it gives.
    experts, rows, count, width = parts["blocks"].shape
    out = torch.empty((experts, count * 2 * width, rows), dtype=dtype)
    for number in range(experts):
        one = slice(number, number + 1)
        out[one] = convert_moe_packed_tensors(parts["blocks"][one], parts["scales"][one], dtype=dtype)
    return out
