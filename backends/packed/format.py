"""How one parameter of a model is packed: what ``quantization_config`` of a packed folder says of it.

"quantization_config": {"quant_method": "sparsify", "format": 1, "sites": {PARAMETER: {
    "layout": "packed24", "rows": 64, "columns": 64, "experts": null, "transposed": false, "values": 2048}}}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import CheckpointError
from sparsify.runtime.layout import PADDING, Packed, pack, padded
from sparsify.runtime.words import LAYOUTS, Layout

CODES = {"packed24": "meta", "bitmask": "mask"}


@dataclass(frozen=True)
class PackedSite:
    """A parameter stored as packed matrices [rows, columns] = [out_features, in_features].

    Attributes:
        experts: how many matrices are stacked; None for a plain one. Their rows are stored one below the other.
        transposed: whether the parameter itself is laid out [..., in_features, out_features].
        values: how many values are stored, padding left out.
    """

    layout: Layout
    rows: int
    columns: int
    experts: int | None
    transposed: bool
    values: int

    @classmethod
    def of(cls, name: str, entry: object) -> PackedSite:
        """Check one entry of ``sites``.

        Raises:
            CheckpointError: fields that are missing, unknown or out of range.
        """
        if not isinstance(entry, Mapping):
            raise _damaged(name, f"fields {entry!r}")
        if set(entry) != set(cls.__dataclass_fields__):
            raise _damaged(name, f"fields {sorted(entry)}")
        if not _in_range(entry):
            raise _damaged(name, f"layout {entry['layout']!r}" if entry["layout"] not in LAYOUTS else f"{dict(entry)}")
        site = cls(**entry)
        cells = site.height * padded(site.columns)
        if site.values > cells or (site.layout == "packed24" and site.values != cells // 2):
            raise _damaged(name, f"{site.values} values for {site.height}×{site.columns} as {site.layout}")
        return site

    @property
    def height(self) -> int:
        """Rows of all matrices."""
        return self.rows * (self.experts or 1)

    @property
    def shape(self) -> torch.Size:
        """Of the parameter."""
        matrix = (self.columns, self.rows) if self.transposed else (self.rows, self.columns)
        return torch.Size(matrix if self.experts is None else (self.experts, *matrix))

    @property
    def values_shape(self) -> tuple[int, ...]:
        if self.layout == "bitmask":
            return (self.values + PADDING,)
        return (*self._lead, padded(self.columns) // 2)

    @property
    def codes_shape(self) -> tuple[int, ...]:
        return (*self._lead, padded(self.columns) // (8 if self.layout == "packed24" else 32))

    @property
    def codes_dtype(self) -> torch.dtype:
        return torch.uint8 if self.layout == "packed24" else torch.int32

    @property
    def _lead(self) -> tuple[int, ...]:
        return (self.rows,) if self.experts is None else (self.experts, self.rows)

    def packed(self, values: Tensor, codes: Tensor) -> Packed:
        """The tensors of a file as one matrix [height, columns]."""
        flat = values if self.layout == "bitmask" else values.flatten(0, -2)
        return Packed(self.layout, (self.height, self.columns), flat, codes.flatten(0, -2))

    def parameter(self, matrix: Tensor) -> Tensor:
        """A dense matrix [height, columns] in the layout of the parameter."""
        stack = matrix.view(*self._lead, self.columns)
        return (stack.transpose(-1, -2) if self.transposed else stack).contiguous()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _in_range(entry: Mapping[str, Any]) -> bool:
    """Whether the values of a site's fields are of their kinds, and not out of all bounds."""
    experts = entry["experts"] if entry["experts"] is not None else 1
    numbers = ((entry["rows"], 1), (entry["columns"], 1), (experts, 1), (entry["values"], 0))
    whole = all(type(n) is int and low <= n < 1 << 48 for n, low in numbers)
    return entry["layout"] in LAYOUTS and isinstance(entry["transposed"], bool) and whole


def _damaged(name: str, found: str) -> CheckpointError:
    do = "config.json is damaged or not of this format: pack it again"
    return CheckpointError(f"packed parameter {name}", found=found, do=do)


def codes_name(parameter: str, layout: Layout) -> str:
    """What the tensor beside a parameter's values is called in a file: ``….weight_meta``, ``….weight_mask``."""
    return f"{parameter}_{CODES[layout]}"


def pack_parameter(
    matrices: Tensor, layout: Layout, *, stacked: bool, transposed: bool
) -> tuple[PackedSite, Tensor, Tensor]:
    """Pack [experts, out_features, in_features]: the site, and its values and codes as they are stored.

    Raises:
        PatternError: as :func:`pack`.
    """
    experts, rows, columns = matrices.shape
    packed = pack(matrices.reshape(experts * rows, columns), layout)
    values = packed.values.numel() - (PADDING if layout == "bitmask" else 0)
    site = PackedSite(layout, rows, columns, experts if stacked else None, transposed, values)
    return site, packed.values.view(site.values_shape), packed.codes.view(site.codes_shape)
