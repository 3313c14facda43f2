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
from sparsify.runtime.cuda.dispatch import POLICIES
from sparsify.runtime.layout import LAYOUTS, PADDING, Layout, Packed, pack, padded

METHOD = "sparsify"
FORMAT = 1
# What quantization_config may say beside ``note``.
FIELDS = ("quant_method", "format", "sites", "siblings", "gpu")
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
    def of(cls, name: str, entry: Any) -> PackedSite:
        """Check one entry of ``sites``.

        Raises:
            CheckpointError: fields that are missing, unknown or out of range.
        """
        fields = cls.__dataclass_fields__
        found = None
        if not isinstance(entry, Mapping) or set(entry) != set(fields):
            found = f"fields {sorted(entry) if isinstance(entry, Mapping) else entry!r}"
        elif entry["layout"] not in LAYOUTS:
            found = f"layout {entry['layout']!r}"
        elif not isinstance(entry["transposed"], bool) or not all(
            type(n) is int and low <= n < 1 << 48
            for n, low in (
                (entry["rows"], 1),
                (entry["columns"], 1),
                (entry["experts"] if entry["experts"] is not None else 1, 1),
                (entry["values"], 0),
            )
        ):
            found = f"{dict(entry)}"
        if found is not None:
            raise CheckpointError(
                f"packed parameter {name}",
                found=found,
                do="config.json is damaged or not of this format: pack it again",
            )
        site = cls(**entry)
        cells = site.height * padded(site.columns)
        if site.values > cells or (site.layout == "packed24" and site.values != cells // 2):
            raise CheckpointError(
                f"packed parameter {name}",
                found=f"{site.values} values for {site.height}×{site.columns} as {site.layout}",
                do="config.json is damaged: pack it again",
            )
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


def without_packing(config: dict[str, Any]) -> dict[str, Any]:
    """The content of a config.json whose weights are dense again."""
    quantization = config.get("quantization_config")
    if isinstance(quantization, Mapping) and quantization.get("quant_method") == METHOD:
        return {key: value for key, value in config.items() if key != "quantization_config"}
    return config


def sites_of(config: Mapping[str, Any], where: str) -> dict[str, PackedSite] | None:
    """The packed parameters that a config.json speaks of; None where it is not of a packed folder.

    Raises:
        CheckpointError: a newer format, or entries that are damaged.
    """
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != METHOD:
        return None
    version = quantization.get("format")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"packed folder {where}", found=f"format {version!r}", do="config.json is damaged")
    if version > FORMAT:
        raise CheckpointError(
            f"packed folder {where}",
            found=f"format {version}; this sparsify reads up to {FORMAT}",
            do="Install a newer sparsify (pip install -U sparsify-fx)",
        )
    sites = quantization.get("sites")
    if not isinstance(sites, Mapping) or not sites:
        raise CheckpointError(f"packed folder {where}", found="no sites in it", do="config.json is damaged")
    return {str(name): PackedSite.of(str(name), entry) for name, entry in sites.items()}


def check_gpu(siblings: Any, gpu: Any, sites: Mapping[str, Any]) -> None:
    """Check what a config.json says of GPUs.

    Args:
        siblings: groups of names of ``sites``. gpu: {"policy": …, "tune": …}.

    Raises:
        CheckpointError: it is of another kind, or names what is not packed.
    """
    found = None
    if not isinstance(siblings, list) or not all(isinstance(group, list) for group in siblings):
        found = f"siblings {siblings!r}"
    elif lost := [name for group in siblings for name in group if not isinstance(name, str) or name not in sites]:
        found = f"a sibling {lost[0]!r} that is not packed"
    elif not isinstance(gpu, Mapping) or not set(gpu) <= {"policy", "tune"}:
        found = f"gpu {gpu!r}"
    elif gpu.get("policy", POLICIES[0]) not in POLICIES or not isinstance(gpu.get("tune", True), bool):
        found = f"gpu {dict(gpu)!r}"
    if found is not None:
        raise CheckpointError("quantization_config of a packed folder", found=found, do="config.json is damaged")
