"""ModelOpt's FP8: ``X.weight`` in float8 beside ``X.weight_scale``, one for the tensor or one for each row of it.

W = q · s in float32, rounded once: plain mathematics, for the library dequantizes on a GPU. Source: ``FP8QTensor`` of
nvidia-modelopt; vLLM reads such folders alike. Often config.json does not say so, but hf_quant_config.json, or
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsify.quantized.dense import FLOAT8, FLOATS, Dense, Layout, Tensors, part, refused, scaled

METHOD = "modelopt"
_SUFFIX = "_scale"
_BESIDE = ("input_scale", "output_scale", "k_scale", "v_scale", "q_scale", "prob_output_scale")


def find(tensors: Tensors, config: Mapping[str, Any], where: str) -> Layout:
    """Args:
        config: ``quantization_config`` or the content of hf_quant_config.json.

    Raises:
        CheckpointError: another algorithm than FP8, float8 without a scale, or a scale of another shape.
    """
    inner = config.get("quantization")
    algorithm = (inner if isinstance(inner, dict) else config).get("quant_algo")
    if algorithm not in (None, "FP8", "FP8_PER_CHANNEL_PER_TOKEN"):
        raise refused(where, f"quant_algo {algorithm!r} of ModelOpt, of which FP8 is read")
    known, dense = set(tensors.names()), {}
    for name in known:
        if tensors.dtype(name) not in FLOAT8:
            continue
        shape = tensors.shape(name)
        shapes: list[tuple[int, ...]] = [(), (1,), *([shape[:1], (shape[0], 1)] if len(shape) == 2 else [])]
        parts = {"weight": name, "scale": part(tensors, known, name + _SUFFIX, name, FLOATS, shapes)}
        dense[name] = Dense(parts, shape, _make)
    return Layout(METHOD, dense, frozenset(n for n in known if n.endswith(_BESIDE)))


def _make(parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    weight, scale = parts["weight"], parts["scale"]
    return scaled(weight, scale.reshape(() if scale.numel() == 1 else (-1, 1)), dtype)
