"""Checkpoints of compressed-tensors that vLLM has not read since 2026, served as they are: 2:4 and other weights whose
zeros are left out, of full width or quantized besides, and Marlin-24.

What a tensor is, and what comes of several, is the importer's own (:mod:`sparsify.quantized.compressed_tensors`): a
weight is made dense when its last tensor has come, cut for the rank and packed. Quantized values times their scales are
held in the dtype that the layer computes in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import CheckpointError
from sparsify.quantized.compressed_tensors import marlin, plain
from sparsify.quantized.compressed_tensors.sparse import BITMASK, TWO_FOUR, with_zeros
from sparsify.quantized.dense import FLOATS, refused
from sparsify.quantized.store import made
from sparsify.runtime.layout import Packed, choose_layout, pack

# Of 2:4, of any other zeros, and of Marlin-24; ``dense`` is a leftover, of weights that lie there as ever.
_ZEROS = {"compressed": None, "bitmask": torch.uint8, "shape": torch.int64}
_PARTS: dict[str, dict[str, torch.dtype | None]] = {
    TWO_FOUR: _ZEROS,
    BITMASK: {**_ZEROS, "row_offsets": torch.int64},
    marlin.FORMAT: {"weight_packed": torch.int32, "scale_packed": None, "meta": torch.int16},
    "dense": {},
}
_SCALE, _ZERO_POINT = "weight_scale", "weight_zero_point"
# Of activations and caches, which are of full width here.
BESIDE = tuple(f".{name}" for name in (*plain.BESIDE, *plain.CACHES))


def form_of(config: Mapping[str, Any]) -> str | None:
    """How weights of a ``quantization_config`` lie, if they are such; None of others."""
    if config.get("quant_method") != plain.METHOD:
        return None
    if config.get("format") == marlin.FORMAT and config.get("config_groups"):
        return marlin.FORMAT
    sparsity = config.get("sparsity_config")
    form = sparsity.get("format") if isinstance(sparsity, Mapping) else None
    if form not in _PARTS or form == marlin.FORMAT or (form == "dense" and config.get("config_groups")):
        return None
    return str(form)


def is_left_over(config: Mapping[str, Any]) -> bool:
    """Whether a config says of quantized weights, which vLLM reads itself, that nothing is left out of them: at that
    entry alone vLLM refuses them.
    """
    sparsity = config.get("sparsity_config")
    if config.get("quant_method") != plain.METHOD or not isinstance(sparsity, Mapping):
        return False
    return bool(config.get("config_groups")) and sparsity.get("format") == "dense"


@dataclass(frozen=True)
class Orphans:
    """What a config says of such weights.

    Attributes:
        groups: ``quantization_config``, where weights are quantized besides. dense, whole: modules of which nothing is
            left out, and those that are not quantized; by their names or ``re:`` and an expression.
    """

    form: str
    groups: Mapping[str, Any] | None = None
    dense: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Orphans | None:
        form = form_of(config)
        if form is None:
            return None
        quantized = _names(config.get("ignore"))
        if form == marlin.FORMAT:
            return cls(form, config, quantized, quantized)
        zeros = _names(config["sparsity_config"].get("ignore"))
        groups = config if config.get("config_groups") else None
        return cls(form, groups, zeros if groups else (*quantized, *zeros), quantized)

    def ignored(self, module: str) -> bool:
        """Whether the weight of ``module`` lies there as ever."""
        return self.form == "dense" or (_matches(self.dense, module) and not self.quantized(module))

    def quantized(self, module: str) -> bool:
        return self.groups is not None and not _matches(self.whole, module)

    def orphan(self, module: str) -> Orphan:
        return Orphan(module, self.form, self.groups if self.quantized(module) else None)


@dataclass
class Orphan:
    """A weight of which either all values come, or those that are not zero; of full width or quantized.

    Attributes:
        groups: where it is quantized, the ``quantization_config`` that says how.
    """

    module: str
    form: str
    groups: Mapping[str, Any] | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.module}.weight"

    @property
    def rows(self) -> int | None:
        return None

    @property
    def tensors(self) -> Mapping[str, torch.dtype | None]:
        return tensors_of(self.form)

    def add(self, tensor_name: str, tensor: Tensor) -> Packed | Tensor | None:
        if tensor_name == "weight" and tensor.dtype in FLOATS:
            return tensor
        self.parts[tensor_name] = tensor
        # Older writers stored zero points of symmetric numbers too, which are zeros.
        if not self._wanted() <= set(self.parts):
            return None
        full = self._whole()
        layout = choose_layout(full)
        return pack(full, layout) if isinstance(layout, str) else full

    @property
    def missing(self) -> list[str]:
        wanted = sorted(self._wanted()) if self.parts else list(_PARTS[self.form])[:1]
        return [f"{self.module}.{part}" for part in wanted if part not in self.parts]

    def _wanted(self) -> set[str]:
        stored = {"weight"} if "weight" in self.parts else set(_PARTS[self.form])
        if self.groups is None or self.form == marlin.FORMAT:
            return stored
        return stored | self._scales()

    def _scales(self) -> set[str]:
        assert self.groups is not None
        scheme = plain.scheme_of(self.groups, self.module, f"weight {self.name}")
        symmetric = scheme.weights is None or scheme.weights.symmetric
        return {_SCALE} if symmetric else {_SCALE, _ZERO_POINT}

    def _whole(self) -> Tensor:
        """The matrix [rows, columns] of its parts."""
        parts, self.parts = self.parts, {}
        if "compressed" in parts:
            parts["weight"] = _with_zeros(self.name, parts)
        if self.groups is None:
            weight = parts["weight"]
            if weight.dtype not in FLOATS:
                raise refused(f"weight {self.name}", f"stored in {weight.dtype}, and no group of its config is for it")
            return weight
        held = _Held({f"{self.module}.{name}": tensor for name, tensor in parts.items()})
        dense = plain.find(held, self.groups, f"weight {self.name}").dense[self.name]
        # Rounded once, where it is brought into the dtype of the layer.
        return made(self.name, {r: held.read(n) for r, n in dense.parts.items()}, dense, torch.float32)


def tensors_of(form: str) -> dict[str, torch.dtype | None]:
    """What may come of a weight, by the name in its module; with the dtype (None: the layer's)."""
    return {"weight": None, **_PARTS[form], _SCALE: None, _ZERO_POINT: None}


def _with_zeros(name: str, parts: Mapping[str, Tensor]) -> Tensor:
    """Takes the parts of what is stored without its zeros out of ``parts``."""
    sizes, values, mask = parts["shape"].flatten().tolist(), parts["compressed"], parts["bitmask"]
    starts = parts.get("row_offsets")
    if len(sizes) != 2 or tuple(mask.shape) != (sizes[0], -(-sizes[1] // 8)) or (starts is None and sizes[1] % 4):
        raise CheckpointError(
            f"weight {name}",
            found=f"a mask {list(mask.shape)} and sizes {sizes}, which do not fit",
            do="Fetch the folder again",
        )
    return with_zeros(name, values, mask, starts, (sizes[0], sizes[1]))


@dataclass(frozen=True)
class _Held:
    """Tensors of one module, as the importer reads a folder's."""

    tensors: Mapping[str, Tensor]

    def names(self) -> Iterable[str]:
        return self.tensors

    def shape(self, name: str) -> torch.Size:
        return self.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


def _names(ignore: Iterable[object] | None) -> tuple[str, ...]:
    return tuple(str(name) for name in ignore or ())


def _matches(names: Iterable[str], module: str) -> bool:
    return any(
        re.match(name.removeprefix("re:"), module) is not None if name.startswith("re:") else name == module
        for name in names
    )
