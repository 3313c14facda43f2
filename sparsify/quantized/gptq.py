"""GPTQ: ``X.qweight`` [in / n, out] with n numbers in an int32, ``qzeros`` [groups, out / n], ``scales`` [groups, out],
``g_idx`` [in], the group of each input.

W[o, i] = scales[g, o] · (q[i, o] − z[g, o]), g = g_idx[i], in float32 and rounded once: plain mathematics, for the
libraries (gptqmodel) bring kernels that are compiled where they are installed. Source: AutoGPTQ's
qlinear_cuda_old.py. A zero point is stored less one (format "gptq"; "gptq_v2" stores it as it is), modulo 2^bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import CheckpointError
from sparsify.quantized.dense import FLOATS, Dense, Layout, Tensors, number, part, refused

METHOD = "gptq"
_FORMATS = {"gptq": 1, "gptq_v2": 0}


def find(tensors: Tensors, config: Mapping[str, Any], where: str) -> Layout:
    """Args:
        config: ``bits``, ``group_size`` (−1: one group), ``checkpoint_format``.

    Raises:
        CheckpointError: bits or a format that are not read, or parts that are missing or of another shape.
    """
    bits = number(config, "bits", (2, 4, 8), where)
    group = config.get("group_size", -1)
    if type(group) is not int or (group < 1 and group != -1):
        raise refused(where, f"group_size {group!r} of GPTQ")
    form = config.get("checkpoint_format") or config.get("format") or "gptq"
    if form not in _FORMATS:
        raise refused(where, f"checkpoint_format {form!r} of GPTQ, of which {' and '.join(_FORMATS)} are read")
    known, dense = set(tensors.names()), {}
    for packed in (n for n in known if n.endswith(".qweight")):
        base = packed.removesuffix("qweight")
        name, each = f"{base}weight", 32 // bits
        part(tensors, known, packed, name, (torch.int32,))
        shape = tensors.shape(packed)
        if len(shape) != 2 or shape[1] % each:
            raise refused(where, f"{packed} of the shape {list(shape)}, which is none of {bits} bits")
        inputs, outputs = shape[0] * each, shape[1]
        groups = 1 if group == -1 else -(-inputs // group)
        parts = {
            "weight": packed,
            "zeros": part(tensors, known, f"{base}qzeros", name, (torch.int32,), [(groups, outputs // each)]),
            "scales": part(tensors, known, f"{base}scales", name, FLOATS, [(groups, outputs)]),
        }
        if (index := f"{base}g_idx") in known:
            parts["index"] = part(tensors, known, index, name, (torch.int32, torch.int64), [(inputs,)])
        made = partial(_make, bits=bits, group=inputs if group == -1 else group, less=_FORMATS[form])
        dense[name] = Dense(parts, torch.Size((outputs, inputs)), made)
    return Layout(METHOD, dense)


def unpacked(words: Tensor, bits: int, axis: int) -> Tensor:
    """The numbers in int32 ``words`` [a, b], the lowest bits first, along ``axis``, as int16."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    each = (words.unsqueeze(axis + 1) >> shifts.reshape((-1, 1) if axis == 0 else (-1,))) & ((1 << bits) - 1)
    return each.to(torch.int16).flatten(axis, axis + 1)


def _make(parts: Mapping[str, Tensor], dtype: torch.dtype, *, bits: int, group: int, less: int) -> Tensor:
    weight, scales = parts["weight"], parts["scales"].to(torch.float32)
    inputs, outputs = weight.shape[0] * (32 // bits), weight.shape[1]
    zeros = (unpacked(parts["zeros"], bits, 1) + less) & ((1 << bits) - 1)
    index = parts["index"].to(torch.int64) if "index" in parts else torch.arange(inputs) // group
    if inputs and (int(index.min()) < 0 or int(index.max()) >= len(scales)):
        raise CheckpointError(
            "a GPTQ weight",
            found=f"g_idx names groups {int(index.min())} to {int(index.max())} of {len(scales)}",
            do="The file is damaged: fetch it again",
        )
    out = torch.empty((inputs, outputs), dtype=dtype)
    # In pieces, for float32 takes eight times what the weight does.
    step = max(1, (1 << 20) // max(1, outputs)) * (32 // bits)
    for begin in range(0, inputs, step):
        rows = slice(begin, begin + step)
        numbers = unpacked(weight[begin * bits // 32 : (begin + step) * bits // 32], bits, 0)
        of = index[rows]
        out[rows] = ((numbers - zeros[of]).to(torch.float32) * scales[of]).to(dtype)
    return out.T
