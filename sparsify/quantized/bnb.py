"""bitsandbytes: ``X.weight`` in four bits (nf4, fp4) beside its absmax, map and state, or in int8 beside ``X.SCB``.

The library makes one weight dense, on a CPU too: ``dequantize_4bit``, ``int8_vectorwise_dequant``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import CheckpointError
from sparsify.files.json_text import parse_json
from sparsify.quantized.dense import FLOATS, Dense, Layout, Tensors, library, part, refused

METHOD = "bitsandbytes"
_STATE = ".quant_state.bitsandbytes__"
_STATS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_WORDS = ("float16", "bfloat16", "float32")
_MAX_STATE = 1 << 16


def find(tensors: Tensors, config: Mapping[str, Any], where: str) -> Layout:
    """Raises:
    CheckpointError: no bitsandbytes here, or parts that are missing, of another shape or damaged.
    """
    library("bitsandbytes", "bitsandbytes", where)
    known, dense, beside = set(tensors.names()), {}, set[str]()
    for name in known:
        state = next((s for kind in ("nf4", "fp4") if (s := f"{name}{_STATE}{kind}") in known), None)
        if state is not None:
            dense[name] = _four_bits(tensors, known, name, state)
        elif name.endswith(".weight") and (scales := f"{name.removesuffix('weight')}SCB") in known:
            shape = tensors.shape(part(tensors, known, name, name, (torch.int8,)))
            part(tensors, known, scales, name, (torch.float32,), [shape[:1], (shape[0], 1)])
            dense[name] = Dense({"weight": name, "scales": scales}, shape, _eight_bits)
            beside |= {f"{name}_format"} & known
        elif name.endswith(".weight") and tensors.dtype(name) in (torch.uint8, torch.int8):
            raise refused(where, f"{name} in {tensors.dtype(name)} without the state that it is read with")
    return Layout(METHOD, dense, frozenset(beside))


def _four_bits(tensors: Tensors, known: Collection[str], name: str, state: str) -> Dense:
    """Held against the sizes that its state names: what the library is given it does not check."""
    asked, do = f"quantized weight {name}", "The file is damaged: fetch it again"
    try:
        if tensors.shape(state).numel() > _MAX_STATE:
            raise ValueError(f"{tensors.shape(state).numel()} bytes")
        facts = parse_json(bytes(tensors.read(state).tolist()))
        shape, block, kind = torch.Size(facts["shape"]), facts["blocksize"], facts["quant_type"]
        count = math.prod(shape)
        if block not in _BLOCKS or facts["dtype"] not in _WORDS or not state.endswith(kind) or count < 0:
            raise ValueError(f"blocksize {block!r}, dtype {facts['dtype']!r}, quant_type {kind!r}")
        blocks, nested = -(-count // block), "nested_blocksize" in facts
        if nested:
            inner = facts["nested_blocksize"]
            float(facts["nested_offset"])
            if inner not in _BLOCKS or facts["nested_dtype"] not in _WORDS:
                raise ValueError(f"nested_blocksize {inner!r}, nested_dtype {facts['nested_dtype']!r}")
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise CheckpointError(asked, found=f"{state} cannot be read ({error})", do=do) from error
    parts = {"weight": part(tensors, known, name, name, (torch.uint8, torch.int8, *FLOATS)), "state": state}
    if tensors.shape(name).numel() * tensors.dtype(name).itemsize * 2 != count + count % 2:
        raise CheckpointError(
            asked, found=f"{list(tensors.shape(name))} of {tensors.dtype(name)} for {list(shape)} in four bits", do=do
        )
    sizes = {"absmax": (blocks,), "quant_map": (16,)}
    if nested:
        sizes |= {"nested_absmax": (-(-blocks // inner),), "nested_quant_map": (256,)}
    for stat, size in sizes.items():
        dtype = torch.uint8 if stat == "absmax" and nested else torch.float32
        parts[stat] = part(tensors, known, f"{name}.{stat}", name, (dtype,), [size])
    return Dense(parts, shape, partial(_make, key=state.removeprefix(f"{name}.")))


def _make(parts: Mapping[str, Tensor], dtype: torch.dtype, *, key: str) -> Tensor:
    functional = library("bitsandbytes", "bitsandbytes", "a bitsandbytes weight").functional
    stats = {name: parts[name] for name in _STATS if name in parts} | {key: parts["state"]}
    state = functional.QuantState.from_dict(stats, device=torch.device("cpu"))
    made: Tensor = functional.dequantize_4bit(parts["weight"], state)
    return made.to(dtype)


def _eight_bits(parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    functional = library("bitsandbytes", "bitsandbytes", "a bitsandbytes weight").functional
    made: Tensor = functional.int8_vectorwise_dequant(parts["weight"], parts["scales"])
    return made.to(dtype)
