"""Checkpoints of compressed-tensors whose zeros are left out, which vLLM read until 2026: served as they are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import CheckpointError
from sparsify.quantized.compressed_tensors.plain import METHOD
from sparsify.quantized.compressed_tensors.sparse import BITMASK, TWO_FOUR, with_zeros
from sparsify.runtime.layout import Packed, choose_layout, pack

# Of 2:4, and of any other zeros; ``dense`` is a leftover, of weights that lie there as ever.
_PARTS: dict[str, dict[str, torch.dtype]] = {
    TWO_FOUR: {"bitmask": torch.uint8, "shape": torch.int64},
    BITMASK: {"bitmask": torch.uint8, "shape": torch.int64, "row_offsets": torch.int64},
    "dense": {},
}


def form_of(config: Mapping[str, Any]) -> str | None:
    """How weights of a ``quantization_config`` lie, if they are such; None of other and of quantized ones."""
    sparsity = config.get("sparsity_config")
    if config.get("quant_method") != METHOD or not isinstance(sparsity, Mapping) or config.get("config_groups"):
        return None
    form = sparsity.get("format")
    return form if form in _PARTS else None


@dataclass(frozen=True)
class Orphans:
    """What a config says of such weights.

    Attributes:
        ignore: modules that are dense, by their names or ``re:`` and an expression.
    """

    form: str
    ignore: tuple[str, ...]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Orphans | None:
        form = form_of(config)
        if form is None:
            return None
        names = [*(config.get("ignore") or ()), *(config["sparsity_config"].get("ignore") or ())]
        return cls(form, tuple(str(name) for name in names))

    def ignored(self, module: str) -> bool:
        return self.form == "dense" or any(
            re.match(name.removeprefix("re:"), module) is not None if name.startswith("re:") else name == module
            for name in self.ignore
        )


@dataclass
class Orphan:
    """A weight of which either all values come, or those that are not zero."""

    module: str
    form: str
    parts: dict[str, Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.module}.weight"

    @property
    def rows(self) -> int | None:
        return None

    @property
    def tensors(self) -> Mapping[str, torch.dtype | None]:
        return {"weight": None, "compressed": None, **_PARTS[self.form]}

    def add(self, tensor_name: str, tensor: Tensor) -> Packed | Tensor | None:
        if tensor_name == "weight":
            return tensor
        self.parts[tensor_name] = tensor
        if set(self.parts) != {"compressed", *_PARTS[self.form]}:
            return None
        parts, self.parts = self.parts, {}
        sizes, values, mask = parts["shape"].flatten().tolist(), parts["compressed"], parts["bitmask"]
        starts = parts.get("row_offsets")
        if len(sizes) != 2 or tuple(mask.shape) != (sizes[0], -(-sizes[1] // 8)) or (starts is None and sizes[1] % 4):
            raise CheckpointError(
                f"weight {self.name}",
                found=f"a mask {list(mask.shape)} and sizes {sizes}, which do not fit",
                do="Fetch the folder again",
            )
        full = with_zeros(self.name, values, mask, starts, (sizes[0], sizes[1]))
        layout = choose_layout(full)
        return pack(full, layout) if isinstance(layout, str) else full

    @property
    def missing(self) -> list[str]:
        wanted = ["compressed", *_PARTS[self.form]] if self.parts else ["compressed"]
        return [f"{self.module}.{part}" for part in wanted if part not in self.parts]
