"""How one parameter of a model is packed: what ``quantization_config`` of a packed folder says of it.

"quantization_config": {"quant_method": "sparsify", "format": 1, "sites": {PARAMETER: {
    "layout": "packed24", "rows": 64, "columns": 64, "experts": null, "transposed": false, "values": 2048}}}

Of a parameter of few bits also ``"bits": 4, "group": 64``; the format is 2 then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import CheckpointError
from sparsify.runtime.few_bits import BITS, Integers, groups
from sparsify.runtime.layout import PADDING, Packed, pack, pack_integers, padded
from sparsify.runtime.words import FEW_LAYOUTS, LAYOUTS, Layout

CODES = {"packed24": "meta", "bitmask": "mask"}
_GROUPS = (None, 32, 64, 128)
_FEW_FIELDS = {"bits", "group"}


@dataclass(frozen=True)
class PackedSite:
    """A parameter stored as packed matrices [rows, columns] = [out_features, in_features].

    Attributes:
        experts: how many matrices are stacked; None for a plain one. Their rows are stored one below the other.
        transposed: whether the parameter itself is laid out [..., in_features, out_features].
        values: how many numbers the tensor of values holds, padding left out.
        bits, group: of integers, and the columns that share a scale (None: all of a row); ``bits`` is None where the
            values have the dtype of the parameter.
    """

    layout: Layout
    rows: int
    columns: int
    experts: int | None
    transposed: bool
    values: int
    bits: int | None = None
    group: int | None = None

    @classmethod
    def of(cls, name: str, entry: object) -> PackedSite:
        """Check one entry of ``sites``.

        Raises:
            CheckpointError: fields that are missing, unknown or out of range.
        """
        if not isinstance(entry, Mapping):
            raise _damaged(name, f"fields {entry!r}")
        fields, few = set(cls.__dataclass_fields__), "bits" in entry or "group" in entry
        if set(entry) != (fields if few else fields - _FEW_FIELDS):
            raise _damaged(name, f"fields {sorted(entry)}")
        layouts = FEW_LAYOUTS if few else LAYOUTS
        if not _in_range(entry, layouts) or (few and not _are_few(entry)):
            raise _damaged(name, f"layout {entry['layout']!r}" if entry["layout"] not in layouts else f"{dict(entry)}")
        site = cls(**entry)
        if not (site.values <= site.most if site.layout == "bitmask" else site.values == site.most):
            raise _damaged(name, f"{site.values} values for {site.height}×{site.columns} as {site.label}")
        return site

    @property
    def label(self) -> str:
        """How it lies, for people: ``packed24``, ``packed24 int4``."""
        return self.layout if self.bits is None else f"{self.layout} int{self.bits}"

    @property
    def height(self) -> int:
        """Rows of all matrices."""
        return self.rows * (self.experts or 1)

    @property
    def most(self) -> int:
        """As many numbers as the tensor of values can hold; of packed24 and ``dense``, as many as it holds."""
        cells = self.height * padded(self.columns, self.bits) // (2 if self.bits == 4 else 1)
        return cells // 2 if self.layout == "packed24" else cells

    @property
    def shape(self) -> torch.Size:
        """Of the parameter."""
        matrix = (self.columns, self.rows) if self.transposed else (self.rows, self.columns)
        return torch.Size(matrix if self.experts is None else (self.experts, *matrix))

    @property
    def values_shape(self) -> tuple[int, ...]:
        return (self.values + PADDING,) if self.layout == "bitmask" else (*self._lead, self.most // self.height)

    @property
    def codes_shape(self) -> tuple[int, ...]:
        """[…, 0] of ``dense``, which has none."""
        full = padded(self.columns, self.bits)
        return (*self._lead, 0 if self.layout == "dense" else full // (8 if self.layout == "packed24" else 32))

    @property
    def codes_dtype(self) -> torch.dtype:
        return torch.int32 if self.layout == "bitmask" else torch.uint8

    @property
    def parts(self) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """Its tensors in a file and in a module: what follows the parameter's name, with shape and dtype (None: the
        parameter's own). The parameter's name itself is that of the values, or of the scales of integers.
        """
        codes = {} if self.layout == "dense" else {f"_{CODES[self.layout]}": (self.codes_shape, self.codes_dtype)}
        if self.bits is None:
            return {"": (self.values_shape, None), **codes}
        kind = torch.int8 if self.bits == 8 else torch.uint8
        scales = (*self._lead, groups(self.columns, self.group))
        return {"": (scales, None), "_integers": (self.values_shape, kind), **codes}

    @property
    def _lead(self) -> tuple[int, ...]:
        return (self.rows,) if self.experts is None else (self.experts, self.rows)

    def packed(self, part: Callable[[str], Tensor]) -> Packed:
        """One matrix [height, columns] of what ``part`` gives for each of :attr:`parts`."""
        values = part("" if self.bits is None else "_integers")
        flat = values if self.layout == "bitmask" else values.flatten(0, -2)
        if self.layout == "dense":
            codes = torch.empty(self.height, 0, dtype=torch.uint8, device=values.device)
        else:
            codes = part(f"_{CODES[self.layout]}").flatten(0, -2)
        scales = None if self.bits is None else part("").flatten(0, -2)
        return Packed(self.layout, (self.height, self.columns), flat, codes, scales, self.bits, self.group)

    def tensors(self, packed: Packed) -> dict[str, Tensor]:
        """:attr:`parts` of one matrix [height, columns]: undoes :meth:`packed`."""
        found = {} if self.layout == "dense" else {f"_{CODES[self.layout]}": packed.codes}
        if packed.scales is None:
            found[""] = packed.values
        else:
            found |= {"": packed.scales, "_integers": packed.values}
        return {part: found[part].view(shape) for part, (shape, _) in self.parts.items()}

    def parameter(self, matrix: Tensor) -> Tensor:
        """A dense matrix [height, columns] in the layout of the parameter."""
        stack = matrix.view(*self._lead, self.columns)
        return (stack.transpose(-1, -2) if self.transposed else stack).contiguous()

    def as_dict(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if self.bits is not None or k not in _FEW_FIELDS}


def _in_range(entry: Mapping[str, Any], layouts: tuple[Layout, ...]) -> bool:
    """Whether the values of a site's fields are of their kinds, and not out of all bounds."""
    experts = entry["experts"] if entry["experts"] is not None else 1
    numbers = ((entry["rows"], 1), (entry["columns"], 1), (experts, 1), (entry["values"], 0))
    whole = all(type(n) is int and low <= n < 1 << 48 for n, low in numbers)
    return entry["layout"] in layouts and isinstance(entry["transposed"], bool) and whole


def _are_few(entry: Mapping[str, Any]) -> bool:
    bits, group = entry["bits"], entry["group"]
    return type(bits) is int and bits in BITS and (group is None or type(group) is int) and group in _GROUPS


def _damaged(name: str, found: str) -> CheckpointError:
    do = "config.json is damaged or not of this format: fetch the folder again, or pack it again"
    return CheckpointError(f"packed parameter {name}", found=found, do=do)


def pack_parameter(
    matrices: Tensor | Integers, layout: Layout, *, experts: int | None, transposed: bool
) -> tuple[PackedSite, dict[str, Tensor]]:
    """Pack matrices [height, columns] one below the other: the site, and its tensors by what follows its name.

    Args:
        experts: how many they are; None: a plain one.

    Raises:
        PatternError: as :func:`pack`.
    """
    packed = pack_integers(matrices, layout) if isinstance(matrices, Integers) else pack(matrices, layout)
    rows, columns = packed.shape[0] // (experts or 1), packed.shape[1]
    values = packed.values.numel() - (PADDING if layout == "bitmask" else 0)
    site = PackedSite(layout, rows, columns, experts, transposed, values, packed.bits, packed.group)
    return site, site.tensors(packed)
