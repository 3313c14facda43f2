"""The layout ``fragments``: a packed24 matrix in the order in which the sparse tensor cores take it.

A lane's 16-byte load is its operand of ``mma.sp.m16n8k32``, with nothing to decode: ``kernels/fragments.h`` has the
picture. Rows are padded to 16 and columns to 256; 0.5625 of the dense bytes where they are multiples of those. Both
ways are plain torch, on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.runtime.layout import Packed, padded

TILE_ROWS, TILE_COLUMNS = 16, 256
CHUNKS, LANES = 8, 32
# Per tile: eight chunks of values and one of codes, 16 bytes for each of 32 lanes.
TILE_BYTES = (CHUNKS + 1) * LANES * 16
DTYPES = (torch.bfloat16, torch.float16)
# Two groups without a value: positions 0 and 1 of each.
EMPTY_CODES = 0x44


def tiles(rows: int, columns: int) -> tuple[int, int]:
    return -(-rows // TILE_ROWS), -(-columns // TILE_COLUMNS)


def to_fragments(packed: Packed) -> Tensor:
    """Reorder a packed24 matrix of a 16-bit dtype: uint8 [row tiles, column tiles, TILE_BYTES].

    One copy each of the values and the codes, straight to their places.
    """
    high, wide = tiles(*packed.shape)
    values = filled(packed.values.view(torch.int16), high * TILE_ROWS, wide * TILE_COLUMNS // 2, 0)
    codes = filled(packed.codes, high * TILE_ROWS, wide * TILE_COLUMNS // 8, EMPTY_CODES)
    out = torch.empty(high, wide, CHUNKS + 1, LANES, 16, dtype=torch.uint8, device=packed.values.device)
    # A group's place s in its chunk is 4 pair + 2 o + t1, and its number m there 4 o + 2 t1 + pair: lane 4 g + 2 t1 +
    # pair.                 rows:  tile  half g  columns: tile, chunk, pair, o, t1, value
    source = values.view(high, 2, 8, wide, CHUNKS, 2, 2, 2, 2)
    placed = out[:, :, :CHUNKS].view(torch.int16).unflatten(3, (8, 2, 2)).unflatten(6, (2, 2, 2))
    #      to tile, tile, chunk, g, t1, pair, o, half, value
    placed.copy_(source.permute(0, 3, 4, 2, 7, 5, 6, 1, 8))
    place_codes(out[:, :, CHUNKS], codes)
    return out.view(high, wide, TILE_BYTES)


def from_fragments(fragments: Tensor, dtype: torch.dtype, rows: int, columns: int) -> Packed:
    """Undo :func:`to_fragments`, bit for bit."""
    high, wide = tiles(rows, columns)
    chunks = fragments.view(torch.uint8).view(high, wide, CHUNKS + 1, LANES, 16)
    placed = chunks[:, :, :CHUNKS].contiguous().view(torch.int16).view(high, wide, CHUNKS, 8, 2, 2, 2, 2, 2)
    #   tile, tile, chunk, g, t1, pair, o, half, value  ->  tile, half, g, tile, chunk, pair, o, t1, value
    values = placed.permute(0, 7, 3, 1, 2, 5, 6, 4, 8).reshape(high * TILE_ROWS, -1)
    codes = placed_codes(chunks[:, :, CHUNKS])
    full = padded(columns)
    return Packed(
        "packed24",
        (rows, columns),
        values.view(dtype)[:rows, : full // 2].contiguous(),
        codes[:rows, : full // 8].contiguous(),
    )


def place_codes(out: Tensor, codes: Tensor) -> None:
    """Write ``codes`` [rows, columns / 8] of whole tiles to ``out`` [row tiles, column tiles, LANES, 16]."""
    high, wide = out.shape[:2]
    # Four nibbles of one row are 16 bits, in the order of m; lane 4 g + 2 (chunk & 1) + o, word chunk >> 1.
    nibbles = torch.stack((codes & 15, codes >> 4), -1).view(high, 2, 8, wide, CHUNKS // 2, 2, 2, 2, 2)
    #    rows: tile half g, columns: tile, word, odd, pair, o, t1  ->  ..., odd, o, word, half | t1, pair
    ordered = nibbles.permute(0, 3, 2, 5, 7, 4, 1, 8, 6).reshape(high, wide, LANES, 4, 2, 2, 2)
    joined = ordered[..., 0] | ordered[..., 1] << 4
    out.copy_(joined.reshape(high, wide, LANES, 16))


def placed_codes(chunks: Tensor) -> Tensor:
    """Undo :func:`place_codes`."""
    high, wide = chunks.shape[:2]
    joined = chunks.reshape(high, wide, 8, 2, 2, 4, 2, 2)
    nibbles = torch.stack((joined & 15, joined >> 4), -1)
    #   tile, tile, g, odd, o, word, half, t1, pair  ->  tile, half, g, tile, word, odd, pair, o, t1
    ordered = nibbles.permute(0, 6, 2, 1, 5, 3, 8, 4, 7).reshape(high * TILE_ROWS, -1, 2)
    return ordered[..., 0] | ordered[..., 1] << 4


def filled(matrix: Tensor, rows: int, columns: int, value: int) -> Tensor:
    if tuple(matrix.shape) == (rows, columns):
        return matrix.contiguous()
    full = matrix.new_full((rows, columns), value)
    full[: matrix.shape[0], : matrix.shape[1]] = matrix
    return full
