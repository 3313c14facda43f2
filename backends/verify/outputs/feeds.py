"""Inputs to try a graph on: seeded, of every kind that its names tell, of several sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsify.frontend.text_config import text_config

# Rows and tokens of each try. A graph that was traced with two rows and holds one of them is right with one alone.
SIZES = ((2, 7), (1, 3), (5, 12))


def sizes_for(inputs: Sequence[Any], context: int | None) -> Iterator[tuple[int, int]]:
    """The sizes that a graph of ``inputs`` (onnxruntime's own) can be tried on: one, where none of them is free."""
    seen = set()
    for rows, length in SIZES:
        length = min(length, max(1, (context or length + 2) - 2))
        shapes = tuple(tuple(_shape(info, rows, length)) for info in inputs)
        if shapes not in seen:
            seen.add(shapes)
            yield rows, length


def feed_for(inputs: Sequence[Any], model: Any, rows: int, length: int) -> dict[str, Tensor]:
    """One input of every name, [rows, length] where the graph leaves that free."""
    generator = torch.Generator().manual_seed(0)
    config = text_config(model.config)
    feed: dict[str, Tensor] = {}
    for info in inputs:
        name, shape = info.name, _shape(info, rows, length)
        if "mask" in name:
            feed[name] = torch.ones(shape, dtype=torch.long)
            if shape[-1] > 3:
                feed[name][0, -2:] = 0
        elif "position_ids" in name:
            feed[name] = torch.arange(shape[-1]).expand(shape).clone()
        elif "token_type" in name:
            feed[name] = torch.randint(max(1, getattr(config, "type_vocab_size", 1)), shape, generator=generator)
        elif name == "bbox":
            corners = torch.randint(0, 500, shape, generator=generator)
            feed[name] = torch.cat([corners[..., :2], corners[..., :2] + corners[..., 2:]], -1)
        elif name.endswith(("_shapes", "_sizes")):
            # Of what an image consists of: few, for there are as many places as the graph has.
            feed[name] = torch.full(shape, 2)
        elif "int" in info.type:
            feed[name] = _ids(config, shape, generator)
        elif "bool" in info.type:
            feed[name] = torch.rand(shape, generator=generator) < 0.5
        else:
            feed[name] = torch.randn(shape, generator=generator)
        if name == "flattened_patches":  # (each begins with its row and its column, from 1 on)
            feed[name][..., :2] = 1
        feed[name] = feed[name].to(_dtype(info.type, model.dtype))
    pad = getattr(config, "pad_token_id", None)
    ids, mask = feed.get("input_ids"), feed.get("attention_mask")
    if ids is not None and mask is not None and ids.shape[: mask.dim()] == mask.shape and isinstance(pad, int):
        ids[mask == 0] = pad
    return feed


def _dtype(onnx: str, compute: torch.dtype) -> torch.dtype:
    """Of an input that the graph declares as ``onnx``; a mask, too, may be of whole numbers, truth or fractions."""
    if "int32" in onnx:
        return torch.int32
    return torch.bool if "bool" in onnx else torch.long if "int" in onnx else compute


def _ids(config: Any, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Random tokens, each row with one end of text, which some classifiers look for."""
    vocabulary = getattr(config, "vocab_size", None) or 2
    ids = torch.randint(min(1, vocabulary - 1), vocabulary, tuple(shape), generator=generator)
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < vocabulary:
        ids[ids == end] = (end + 1) % vocabulary
        # Not the last one, which may be padding.
        ids[..., 0] = end
    return ids


def _shape(info: Any, rows: int, length: int) -> list[int]:
    """The input's shape; a free first axis is the batch, a free side of an image some pixels, any other a sequence."""
    shape = []
    for axis, size in enumerate(info.shape):
        if isinstance(size, int):
            shape.append(size)
        elif axis == 0:
            shape.append(rows)
        elif info.name.startswith("pixel") and axis >= len(info.shape) - 2:
            shape.append(32 * (2 + length // 6))
        else:
            shape.append(_length(str(size), length))
    return shape


def _length(dim: str, length: int) -> int:
    return max(1, length - 2) if dim.startswith("decoder") else length
