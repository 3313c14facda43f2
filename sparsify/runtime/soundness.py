"""Whether packed tensors are sound: asked of everything that comes from a file."""

from __future__ import annotations

import torch

from sparsify.errors import CheckpointError
from sparsify.runtime.codes import ascending, row_starts, unpack_bits, unpack_pairs
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
    (rows, columns), full = packed.shape, padded(packed.shape[1])
    values, codes = packed.values, packed.codes
    kind, width = (torch.uint8, full // 8) if packed.layout == "packed24" else (torch.int32, full // 32)
    if rows < 1 or columns < 1 or values.dtype not in DTYPES:
        return f"a matrix {[rows, columns]} of {values.dtype}"
    if codes.dtype != kind or list(codes.shape) != [rows, width]:
        return f"codes {list(codes.shape)} of {codes.dtype} where {[rows, width]} of {kind} belong"
    return _damaged_pairs(packed, full) if packed.layout == "packed24" else _damaged_bitmask(packed, full)


def _damaged_pairs(packed: Packed, full: int) -> str | None:
    (rows, columns), values, codes = packed.shape, packed.values, packed.codes
    if list(values.shape) != [rows, full // 2]:
        return f"values {list(values.shape)} where {[rows, full // 2]} belong"
    if not ascending(codes):
        return "a code that is not two ascending positions of four"
    if full > columns and bool(unpack_pairs(values.reshape(-1, 2), codes).view(rows, full)[:, columns:].any()):
        return "values in the columns that only pad the matrix"
    return None


def _damaged_bitmask(packed: Packed, full: int) -> str | None:
    (rows, columns), values, codes = packed.shape, packed.values, packed.codes
    total = int(row_starts(codes)[-1])
    if values.dim() != 1 or values.numel() != total + PADDING:
        return f"values {list(values.shape)} for a mask that counts {total} and {PADDING} of padding"
    if bool(values[total:].any()):
        return "padding after the values that is not zero"
    if full > columns and bool(unpack_bits(codes.contiguous().view(torch.uint8)).view(rows, full)[:, columns:].any()):
        return "a mask that keeps columns which only pad the matrix"
    return None
