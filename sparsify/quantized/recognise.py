"""Which format a folder's weights are in: what config.json says, or a file beside it, or the tensors themselves."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sparsify.files.checkpoint import Checkpoint
from sparsify.files.ledger import Ledger
from sparsify.files.reading import kind_at, read_json
from sparsify.quantized import awq, block_fp8, bnb, gptq, mxfp4, scaled_fp8
from sparsify.quantized.compressed_tensors import plain, sparse
from sparsify.quantized.dense import FLOAT8, SUPPORTED, Layout, Tensors, refused
from sparsify.quantized.restated import AUTO_AWQ, AUTO_GPTQ, LEFT_OUT, MODELOPT, quantization_of, without_quantization
from sparsify.quantized.store import QuantizedStore
from sparsify.words import WEIGHT_DTYPE

Find = Callable[[Tensors, Mapping[str, Any], str], Layout]

# By the quant_method of a quantization_config.
METHODS: dict[str, Find] = {
    block_fp8.METHOD: block_fp8.find,
    mxfp4.METHOD: mxfp4.find,
    plain.METHOD: plain.find,
    scaled_fp8.METHOD: scaled_fp8.find,
    gptq.METHOD: gptq.find,
    awq.METHOD: awq.find,
    bnb.METHOD: bnb.find,
}
_BESIDE = {AUTO_GPTQ: gptq.METHOD, AUTO_AWQ: awq.METHOD}
_DEFAULT: torch.dtype = getattr(torch, WEIGHT_DTYPE)
# How fp8 and compressed-tensors call the scales of weights.
_SCALES = (".weight_scale", ".weight_scale_inv", ".weight_zero_point")
# No weights of a model in use are whole numbers.
_DENSE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class PlainStore(Checkpoint):
    """A folder whose config speaks of compressed-tensors, and whose weights lie there as they are."""

    left_out = LEFT_OUT

    def dense_config(self, config: dict[str, Any]) -> dict[str, Any]:
        return without_quantization(config)


def open_checkpoint(folder: Path, ledger: Ledger, to: torch.dtype | None = None) -> Checkpoint | QuantizedStore:
    """What reads the safetensors of ``folder``: as they lie there, or dense where they are quantized or stored without
    their zeros.

    Args:
        to: what dequantized weights are given in; None: in bfloat16, or what is not quantized in its own.

    Raises:
        CheckpointError: quantized in a way that is not read, a format's library is missing, or a damaged folder.
    """
    checkpoint, where = Checkpoint(folder, ledger=ledger), f"model {folder}"
    if kind_at(folder / "config.json") is None:
        return checkpoint  # whoever builds a model of it says so
    said = quantization_of(read_json(folder / "config.json"))
    if sparse.has_zeros_left_out(checkpoint):
        return _with_zeros(checkpoint, said or {}, where, to)
    if not said:
        empty = said is not None
        method, said = _unsaid(folder, checkpoint)
        if method is None:
            return PlainStore(folder, ledger=ledger) if empty else checkpoint
    elif (method := _method(said)) == plain.METHOD and not said.get("config_groups"):
        if not _seen(checkpoint):
            return PlainStore(folder, ledger=ledger)
        raise refused(where, f"its quantization_config names no groups, and {_seen(checkpoint)} is quantized")
    if method == block_fp8.METHOD and _has_plain_scales(checkpoint):
        # vLLM's own writer calls them so, and lays them out as ModelOpt does.
        method, said = scaled_fp8.METHOD, {}
    if method not in METHODS:
        raise refused(where, f"quantization_config of {method!r} in config.json")
    layout = _without_orphans(checkpoint, METHODS[method](checkpoint, said, where), where)
    _check_rest(checkpoint, layout, where)
    # Where no weight is in the format that is named, what names it is left over.
    return QuantizedStore(checkpoint, layout, to or _DEFAULT) if layout.dense else PlainStore(folder, ledger=ledger)


def _with_zeros(checkpoint: Checkpoint, said: Mapping[str, Any], where: str, to: torch.dtype | None) -> QuantizedStore:
    whole = sparse.WithZeros(checkpoint)
    if not said.get("config_groups"):
        layout = whole.layout(where)
        _check_rest(whole, layout, where)
        return QuantizedStore(whole, layout, to or layout.dtype or _DEFAULT)
    layout = _without_orphans(whole, plain.find(whole, said, where), where)
    _check_rest(whole, layout, where)
    method = f"{whole.method} of {layout.method}"
    return QuantizedStore(whole, replace(layout, method=method), to or _DEFAULT)


def _method(said: Mapping[str, Any]) -> str:
    method = said.get("quant_method")
    if method is None and (said.get("load_in_4bit") or said.get("load_in_8bit")):
        return bnb.METHOD  # which did not name itself at first
    if method is None and "config_groups" in said:
        return plain.METHOD
    return str(method)


def _unsaid(folder: Path, tensors: Tensors) -> tuple[str | None, dict[str, Any]]:
    """The format of a folder whose config.json names none, and what is said of it elsewhere.

    Raises:
        CheckpointError: weights that are no numbers of 16 bits or more, and of no format that is known.
    """
    seen = _seen(tensors)
    if kind_at(folder / MODELOPT):
        return scaled_fp8.METHOD, read_json(folder / MODELOPT)
    if seen is None:
        return None, {}
    names = set(tensors.names())
    if any(name.endswith(".qweight") for name in names):
        for file, method in _BESIDE.items():
            if kind_at(folder / file):
                return method, read_json(folder / file)
    if any(name.endswith("_scale_inv") for name in names):
        return block_fp8.METHOD, {}
    if any(tensors.dtype(name) in FLOAT8 and f"{name}_scale" in names for name in names):
        return scaled_fp8.METHOD, {}
    if any(name.endswith("_blocks") and f"{name.removesuffix('blocks')}scales" in names for name in names):
        return mxfp4.METHOD, {}
    if any(".quant_state.bitsandbytes__" in name for name in names):
        return bnb.METHOD, {}
    raise refused(
        f"model {folder}",
        f"{seen} is stored in {tensors.dtype(seen)}, and neither config.json nor a file beside it says how",
    )


def _has_plain_scales(tensors: Tensors) -> bool:
    names = set(tensors.names())
    kinds = [f"{n}_scale" in names for n in names if tensors.dtype(n) in FLOAT8 and f"{n}_scale_inv" not in names]
    return bool(kinds) and all(kinds)


def _seen(tensors: Tensors) -> str | None:
    """The first matrix of weights that is stored in no float of 16 bits or more."""
    for name in tensors.names():
        weight = name.endswith((".weight", ".qweight", ".weight_packed", "_blocks"))
        many = len(tensors.shape(name)) >= 2 or ".quant_state." in name
        if (weight and many and tensors.dtype(name) not in _DENSE) or tensors.dtype(name) in FLOAT8:
            return name
    return None


def _without_orphans(tensors: Tensors, layout: Layout, where: str) -> Layout:
    """``layout`` less scales of weights that are not quantized or not there: in a dense output they would say that
    something is.
    """
    used = {stored for dense in layout.dense.values() for stored in dense.parts.values()} | layout.beside
    found = sorted(name for name in tensors.names() if name.endswith(_SCALES) and name not in used)
    if not found or not layout.dense:
        return layout
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    warnings.warn(
        f"{where}: {', '.join(found[:3])}{more}: scales of no quantized weight, which are left out",
        RuntimeWarning,
        stacklevel=2,
    )
    return replace(layout, beside=layout.beside | frozenset(found))


def _check_rest(tensors: Tensors, layout: Layout, where: str) -> None:
    """Raises:
    CheckpointError: a weight that is no part of a dense one and is no ordinary number.
    """
    used = {stored for dense in layout.dense.values() for stored in dense.parts.values()} | layout.beside
    for name in tensors.names():
        left = name not in used and name.endswith((".weight", ".qweight", ".weight_packed", "_blocks"))
        if (left and tensors.dtype(name) not in _DENSE) or (name not in used and tensors.dtype(name) in FLOAT8):
            raise refused(
                where,
                f"{name} is stored in {tensors.dtype(name)}, which {layout.method} does not explain",
                f"Fetch the folder again; read are {SUPPORTED}",
            )
