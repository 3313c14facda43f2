"""Whether packed tensors are sound: asked of everything that comes from a file."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.errors import CheckpointError
from sparsify.runtime.codes import ascending, row_starts, unpack_bits, unpack_nibbles, unpack_pairs
from sparsify.runtime.few_bits import BITS, groups
from sparsify.runtime.layout import DTYPES, PADDING, Packed, padded


def check(name: str, packed: Packed) -> None:
    """Check that the tensors of ``packed`` fit each other and hold nothing that a kernel could stumble over.

    Raises:
        CheckpointError: shapes or dtypes that disagree, a code that is none, values that are too few or too many.
    """
    if (found := _damage(packed)) is not None:
        raise CheckpointError(
            f"packed tensor {name}", found=found, do="The folder is damaged or not of this format: pack it again"
        )


def _damage(packed: Packed) -> str | None:
    """What is wrong with ``packed``; None where nothing is."""
    (rows, columns), full = packed.shape, padded(packed.shape[1], packed.bits)
    codes, per_row = packed.codes, {"packed24": 8, "bitmask": 32}.get(packed.layout)
    kind, width = torch.int32 if packed.layout == "bitmask" else torch.uint8, full // per_row if per_row else 0
    if rows < 1 or columns < 1 or packed.dtype not in DTYPES:
        return f"a matrix {[rows, columns]} of {packed.dtype}"
    if codes.dtype != kind or list(codes.shape) != [rows, width]:
        return f"codes {list(codes.shape)} of {codes.dtype} where {[rows, width]} of {kind} belong"
    if packed.scales is not None and (found := _damaged_scales(packed, packed.scales)) is not None:
        return found
    return _damaged_bitmask(packed, full) if packed.layout == "bitmask" else _damaged_rows(packed, full)


def _damaged_scales(packed: Packed, scales: Tensor) -> str | None:
    """What is wrong with the scales of a matrix of few bits, and with the kind of its integers."""
    shape = [packed.shape[0], groups(packed.shape[1], packed.group)]
    kind = torch.int8 if packed.bits == 8 else torch.uint8
    if packed.bits not in BITS or packed.values.dtype != kind:
        return f"{packed.bits} bits in {packed.values.dtype}"
    if list(scales.shape) != shape:
        return f"scales {list(scales.shape)} where {shape} belong"
    return None if bool(scales.isfinite().all()) else "a scale that is no finite number"


def _damaged_rows(packed: Packed, full: int) -> str | None:
    """Of layouts with as many values in every row."""
    (rows, columns), values, codes = packed.shape, packed.values, packed.codes
    width = (full if packed.layout == "dense" else full // 2) * (packed.bits or 8) // 8
    if list(values.shape) != [rows, width]:
        return f"values {list(values.shape)} where {[rows, width]} belong"
    if packed.layout == "packed24" and not ascending(codes):
        return "a code that is not two ascending positions of four"
    if full > columns and bool(_padding(packed, full).any()):
        return "values in the columns that only pad the matrix"
    return None


def _padding(packed: Packed, full: int) -> Tensor:
    """What the columns past those of the matrix hold: of each row the last UNIT of its columns or fewer."""
    first = packed.shape[1] // 8 * 8
    values, codes, past = packed.values, packed.codes[:, first // 8 :], packed.shape[1] - first
    values = values[:, values.shape[1] * first // full :]
    if packed.bits == 4:
        values = unpack_nibbles(values)
    if packed.layout == "packed24":
        values = unpack_pairs(values.reshape(-1, 2), codes).view(packed.shape[0], -1)
    return values[:, past:]


def _damaged_bitmask(packed: Packed, full: int) -> str | None:
    (rows, columns), values, codes = packed.shape, packed.values, packed.codes
    total = int(row_starts(codes, packed.bits)[-1])
    if values.dim() != 1 or values.numel() != total + PADDING:
        return f"values {list(values.shape)} for a mask that counts {total} and {PADDING} of padding"
    if bool(values[total:].any()):
        return "padding after the values that is not zero"
    if full > columns and bool(unpack_bits(codes.contiguous().view(torch.uint8)).view(rows, full)[:, columns:].any()):
        return "a mask that keeps columns which only pad the matrix"
    return None
