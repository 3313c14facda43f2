"""compressed-tensors (llm-compressor, Red Hat AI): ``X.weight`` in int8 or float8, or ``X.weight_packed``, and
``X.weight_scale``.

The library's own compressor of each format makes one weight dense, as transformers lets it (``dequantize=True``). What
it has no code for any more, columns in the order of activations (``weight_g_idx``), is put in order around it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import CheckpointError, first_line
from sparsify.quantized.compressed_tensors import marlin
from sparsify.quantized.dense import FLOAT8, FLOATS, Dense, Layout, Tensors, library, part, refused

METHOD = "compressed-tensors"
PACKED = "pack-quantized"
FORMATS = (PACKED, "int-quantized", "float-quantized", "naive-quantized")
BESIDE = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "input_global_scale")
CACHES = ("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point", "q_zero_point")
_PACKED, _PLAIN = ".weight_packed", ".weight"


def find(tensors: Tensors, config: Mapping[str, Any], where: str) -> Layout:
    """Args:
        config: ``config_groups``, of which each says for which modules (``targets``) it is, and ``format``.

    Raises:
        CheckpointError: the library is missing or cannot read the config, a format that is not read, or parts that
            are missing or of another shape.
    """
    if config.get("format") == marlin.FORMAT:
        return marlin.find(tensors, config, where)
    parsed = _parsed(config, where)
    known, dense = set(tensors.names()), {}
    for stored in known:
        packed = stored.endswith(_PACKED)
        if not packed and not (stored.endswith(_PLAIN) and f"{stored}_scale" in known):
            continue
        module = stored.removesuffix(_PACKED if packed else _PLAIN)
        scheme = _scheme(parsed, module, where)
        form = str(getattr(scheme.format or parsed.format, "value", scheme.format or parsed.format))
        if form not in FORMATS or scheme.weights is None or (form == PACKED) != packed:
            raise refused(
                where, f"{stored} in the format {form!r} of compressed-tensors, of which {', '.join(FORMATS)} are read"
            )
        make = _packed if packed else _plain
        dense[f"{module}.weight"] = make(tensors, known, module, scheme, form)
    ends = tuple(f".{name}" for name in (*BESIDE, *CACHES))
    return Layout(METHOD, dense, frozenset(name for name in known if name.endswith(ends)))


def scheme_of(config: Mapping[str, Any], module: str, where: str) -> Any:
    """The library's scheme of the weight of ``module``.

    Raises:
        CheckpointError: as :func:`find`.
    """
    return _scheme(_parsed(config, where), module, where)


def _parsed(config: Mapping[str, Any], where: str) -> Any:
    library("compressed_tensors", "compressed-tensors", where)
    from compressed_tensors.quantization import QuantizationConfig

    try:
        return QuantizationConfig.model_validate(dict(config))
    except Exception as error:  # pydantic's, and what the library's own checks raise
        raise refused(where, f"compressed-tensors cannot read its config ({first_line(error)})") from error


def _scheme(config: Any, module: str, where: str) -> Any:
    """The group that ``module`` is of: one that names it before one that names its class, as the library has it."""
    groups = list(config.config_groups.values())
    for group in groups:
        for target in group.targets:
            if target.startswith("re:") and re.match(target.removeprefix("re:"), module):
                return group
            if target == module:
                return group
    named = [group for group in groups if not all(target.startswith("re:") for target in group.targets)]
    if not named:
        raise refused(where, f"{module} is quantized, and no group of its config is for it")
    return named[0]


def _packed(tensors: Tensors, known: Collection[str], module: str, scheme: Any, form: str) -> Dense:
    name, bits = f"{module}.weight", scheme.weights.num_bits
    shape = _stored_shape(tensors, known, module)
    words = part(tensors, known, f"{name}_packed", name, (torch.int32,), [(*shape[:-1], -(-shape[-1] * bits // 32))])
    parts = {"weight_packed": words, "weight_shape": f"{name}_shape"} | _scales(tensors, known, name, shape, scheme)
    if not scheme.weights.symmetric:
        groups = tensors.shape(parts["weight_scale"])[-1]
        zeros = [(*shape[:-2], -(-shape[-2] * bits // 32), groups)]
        parts["weight_zero_point"] = part(tensors, known, f"{name}_zero_point", name, (torch.int32,), zeros)
    if f"{name}_g_idx" in known:
        parts["weight_g_idx"] = part(tensors, known, f"{name}_g_idx", name, (torch.int32, torch.int64), [(shape[-1],)])
    return Dense(parts, shape, partial(_make, scheme=scheme, form=form))


def _stored_shape(tensors: Tensors, known: Collection[str], module: str) -> torch.Size:
    """What ``weight_shape`` says: two or three numbers, which are read now."""
    name = f"{module}.weight"
    kinds = (torch.int32, torch.int64)
    stored = part(tensors, known, f"{name}_shape", name, kinds, [(2,), (3,)])
    sizes = tensors.read(stored).tolist()
    if min(sizes) < 0:
        raise CheckpointError(f"quantized weight {name}", found=f"{stored} says {sizes}", do="Fetch the folder again")
    return torch.Size(sizes)


def _plain(tensors: Tensors, known: Collection[str], module: str, scheme: Any, form: str) -> Dense:
    name = f"{module}.weight"
    part(tensors, known, name, name, (torch.int8, *FLOAT8))
    shape = tensors.shape(name)
    parts = {"weight": name} | _scales(tensors, known, name, shape, scheme)
    if not scheme.weights.symmetric:
        same = [tuple(tensors.shape(parts["weight_scale"]))]
        kinds = (torch.int8, *FLOAT8, *FLOATS)
        parts["weight_zero_point"] = part(tensors, known, f"{name}_zero_point", name, kinds, same)
    return Dense(parts, shape, partial(_make, scheme=scheme, form=form))


def _scales(tensors: Tensors, known: Collection[str], name: str, shape: torch.Size, scheme: Any) -> dict[str, str]:
    """The scales of the strategy that the scheme names."""
    args = scheme.weights
    strategy = str(getattr(args.strategy, "value", args.strategy))
    lead, (rows, columns) = tuple(shape[:-2]), shape[-2:]
    shapes: list[tuple[int, ...]] | None = {
        "tensor": [(), (1,)],
        "channel": [(*lead, rows, 1)],
        "group": [(*lead, rows, -(-columns // args.group_size))] if args.group_size else None,
        "block": [(*lead, *(-(-n // b) for n, b in zip((rows, columns), args.block_structure, strict=True)))]
        if args.block_structure
        else None,
    }.get(strategy)
    if shapes is None:
        raise refused(f"quantized weight {name}", f"strategy {strategy!r} of compressed-tensors")
    return {"weight_scale": part(tensors, known, f"{name}_scale", name, FLOATS, shapes)}


def _make(parts: Mapping[str, Tensor], dtype: torch.dtype, *, scheme: Any, form: str) -> Tensor:
    from compressed_tensors.compressors import BaseCompressor

    given = dict(parts)
    order = given.pop("weight_g_idx", None)
    if order is not None and int(order.min()) >= 0:
        return _in_order(given, order.to(torch.int64), scheme).to(dtype)
    made: Tensor = BaseCompressor.get_value_from_registry(form).decompress(given, scheme)["weight"]
    return made.to(dtype)


def _in_order(parts: Mapping[str, Tensor], order: Tensor, scheme: Any) -> Tensor:
    """Columns by their groups, dequantized, and back in their places."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    scale, bits, shape = parts["weight_scale"], scheme.weights.num_bits, torch.Size(parts["weight_shape"].tolist())
    zeros = parts.get("weight_zero_point")
    if zeros is not None:
        zeros = unpack_from_int32(zeros, bits, torch.Size((*shape[:-1], scale.shape[-1])), packed_dim=0)
    places = torch.argsort(order, stable=True)
    if not torch.equal(order[places], torch.arange(len(order)) // scheme.weights.group_size):
        raise ValueError("weight_g_idx names groups of other sizes than group_size")
    numbers = unpack_from_int32(parts["weight_packed"], bits, shape)[:, places]
    made: Tensor = dequantize(x_q=numbers, scale=scale, zero_point=zeros, args=scheme.weights)
    return made[:, torch.argsort(places)]
