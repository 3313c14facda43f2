"""AWQ (gemm): ``X.qweight`` [in, out / 8] with eight numbers of four bits in an int32, ``qzeros`` [groups, out / 8],
``scales`` [groups, out].

W[o, i] = scales[g, o] · (q[i, o] − z[g, o]), g = i // group, in float32 and rounded once: plain mathematics, for the
library that transformers reads such folders with (gptqmodel) brings kernels that are compiled where it is installed.
Source: ``dequantize_gemm`` in AutoAWQ's utils/packing_utils.py: the n-th number of a word is of column 0, 2, 4, 6, 1,
3, 5, 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsify.quantized.dense import FLOATS, Dense, Layout, Tensors, number, part, refused
from sparsify.quantized.gptq import unpacked

METHOD = "awq"
_BITS, _EACH = 4, 8
# The place in a word of each column.
_PLACES = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])


def find(tensors: Tensors, config: Mapping[str, Any], where: str) -> Layout:
    """Args:
        config: ``bits``, ``group_size`` (−1: one group), ``version``; of AutoAWQ's own file w_bit, q_group_size.

    Raises:
        CheckpointError: bits or a version that are not read, or parts that are missing or of another shape.
    """
    config = {"bits": config.get("w_bit"), "group_size": config.get("q_group_size", 128), **config}
    number(config, "bits", (_BITS,), where)
    group = config["group_size"]
    if type(group) is not int or (group < 1 and group != -1):
        raise refused(where, f"group_size {group!r} of AWQ")
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if version != "gemm":
        raise refused(where, f"version {version!r} of AWQ, of which gemm is read")
    known, dense = set(tensors.names()), {}
    for packed in (n for n in known if n.endswith(".qweight")):
        base = packed.removesuffix("qweight")
        name = f"{base}weight"
        part(tensors, known, packed, name, (torch.int32,))
        shape = tensors.shape(packed)
        if len(shape) != 2:
            raise refused(where, f"{packed} of the shape {list(shape)}, where [in, out / 8] belongs")
        inputs, outputs = shape[0], shape[1] * _EACH
        groups = 1 if group == -1 else -(-inputs // group)
        parts = {
            "weight": packed,
            "zeros": part(tensors, known, f"{base}qzeros", name, (torch.int32,), [(groups, shape[1])]),
            "scales": part(tensors, known, f"{base}scales", name, FLOATS, [(groups, outputs)]),
        }
        dense[name] = Dense(
            parts, torch.Size((outputs, inputs)), partial(_make, group=inputs if group == -1 else group)
        )
    return Layout(METHOD, dense)


def _columns(words: Tensor) -> Tensor:
    numbers = unpacked(words, _BITS, 1).unflatten(1, (-1, _EACH))
    return numbers[:, :, _PLACES].flatten(1)


def _make(parts: Mapping[str, Tensor], dtype: torch.dtype, *, group: int) -> Tensor:
    weight, scales, zeros = parts["weight"], parts["scales"].to(torch.float32), _columns(parts["zeros"])
    inputs = len(weight)
    out = torch.empty((inputs, weight.shape[1] * _EACH), dtype=dtype)
    for number_, begin in enumerate(range(0, inputs, group)):
        rows = slice(begin, begin + group)
        out[rows] = ((_columns(weight[rows]) - zeros[number_]).to(torch.float32) * scales[number_]).to(dtype)
    return out.T
