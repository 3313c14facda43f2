"""fp8 in blocks (DeepSeek-V3, Qwen's FP8): ``X`` in float8 beside ``X_scale_inv``, one scale for a block of it.

W = q · s in float32, rounded once. Plain mathematics: transformers' own (``Fp8Dequantize``) takes the size of a block
from the grid of scales, which is another one where the last block is not whole (DeepSeek-V3's ``kv_a_proj``, 576 rows
in blocks of 128). Source: ``weight_dequant`` in DeepSeek-V3's inference/kernel.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsify.quantized.dense import FLOAT8, FLOATS, Dense, Layout, Tensors, part, refused, scaled

METHOD = "fp8"
_SUFFIX = "_scale_inv"
# Of the inputs of layers, whose numbers are quantized while a model runs.
_BESIDE = ("activation_scale", "input_scale", "k_scale", "v_scale")


def find(tensors: Tensors, config: Mapping[str, Any], where: str) -> Layout:
    """Args:
        config: ``weight_block_size`` [rows, columns] or None (one scale a tensor); without the key the grid says it.

    Raises:
        CheckpointError: float8 without a scale, or a scale of another shape.
    """
    known, dense = set(tensors.names()), {}
    size = _size(config.get("weight_block_size"), where)
    for name in known:
        scale = name + _SUFFIX
        if tensors.dtype(name) not in FLOAT8:
            if scale in known and tensors.dtype(name) not in FLOATS:
                raise refused(where, f"{name} in {tensors.dtype(name)}, which fp8 models of four bits have")
            continue
        shape = tensors.shape(name)
        grids: list[tuple[int, ...]] = [(), (1,)]
        if len(shape) >= 2:
            # A stack of experts has a grid for each.
            lead, matrix = tuple(shape[:-2]), shape[-2:]
            grids += [(1, 1)]
            if size is not None:
                grids += [(*lead, *(-(-n // b) for n, b in zip(matrix, size, strict=True)))]
            elif scale in known and "weight_block_size" not in config:
                given = tuple(tensors.shape(scale))
                fits = given[:-2] == lead and all(n and not m % n for n, m in zip(given[-2:], matrix, strict=False))
                grids += [given] if fits and len(given) == len(shape) else []
            grids += [(*lead, 1, 1)]
        scales = (*FLOATS, torch.uint8, torch.float8_e8m0fnu)
        parts = {"weight": name, "scale": part(tensors, known, scale, name, scales, grids)}
        dense[name] = Dense(parts, shape, partial(_make, size=size))
    beside = {n for n in known if n.endswith(_BESIDE) or (n.endswith(_SUFFIX) and n.removesuffix(_SUFFIX) in dense)}
    return Layout(METHOD, dense, frozenset(beside - {p for d in dense.values() for p in d.parts.values()}))


def _size(given: object, where: str) -> tuple[int, int] | None:
    if given is None:
        return None
    if not isinstance(given, list) or len(given) != 2 or not all(type(n) is int and n > 0 for n in given):
        raise refused(where, f"weight_block_size {given!r}, which is no [rows, columns]")
    return given[0], given[1]


def _make(parts: Mapping[str, Tensor], dtype: torch.dtype, *, size: tuple[int, int] | None) -> Tensor:
    weight, scale = parts["weight"], parts["scale"]
    # A byte alone is an exponent, biased by 127.
    scale = (scale.to(torch.float32) - 127).exp2() if scale.dtype == torch.uint8 else scale.to(torch.float32)
    if scale.numel() == 1:
        return scaled(weight, scale.reshape(()), dtype)
    rows, columns = weight.shape[-2:]
    high, wide = size or (rows // scale.shape[-2], columns // scale.shape[-1])
    # One row of blocks at a time, so that the scales never are as large as the weight.
    out = torch.empty(weight.shape, dtype=dtype)
    wide_scale = scale.repeat_interleave(wide, dim=-1)[..., :columns]
    for number in range(scale.shape[-2]):
        block = slice(number * high, (number + 1) * high)
        out[..., block, :] = scaled(weight[..., block, :], wide_scale[..., number : number + 1, :], dtype)
    return out
