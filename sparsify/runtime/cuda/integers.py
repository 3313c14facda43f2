"""The layout ``fragments`` of a packed24 matrix of integers of 8 or 4 bits, with its scales: tiles of 5 or 3 bits a
weight, as ``kernels/integers.h`` has the picture, and 32 bytes for every scale of its rows.

How long a tile is says of what it is: no two grids, nor weights of full width, have the same. Both ways are plain
torch, on any device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.runtime.codes import pack_nibbles, unpack_nibbles
from sparsify.runtime.cuda.fragments import (
    CHUNKS,
    EMPTY_CODES,
    LANES,
    TILE_BYTES,
    TILE_COLUMNS,
    TILE_ROWS,
    filled,
    from_fragments,
    place_codes,
    placed_codes,
    tiles,
    to_fragments,
)
from sparsify.runtime.few_bits import padded
from sparsify.runtime.layout import Packed

_CHUNK_BYTES = LANES * 16
# Bytes of the scales of sixteen rows, one each.
_SCALE_BYTES = 2 * TILE_ROWS
# A nibble is stored with this added.
_MIDDLE = 8


@dataclass(frozen=True)
class IntegerGrid:
    """Of which integers a matrix is.

    Attributes:
        bits: 8 or 4. group: columns that share a scale; None: those of a whole row.
    """

    bits: int
    group: int | None

    @property
    def scales(self) -> int:
        """Of a row of a tile; one where the row has no more."""
        return TILE_COLUMNS // (self.group or TILE_COLUMNS)

    @property
    def tile_bytes(self) -> int:
        return (self.bits // 2 + 1) * _CHUNK_BYTES + self.scales * _SCALE_BYTES

    @property
    def kind(self) -> str:
        """Of the kernels that multiply with it (:class:`sparsify.runtime.cuda.variants.Variant`)."""
        return f"int{self.bits}g{self.group or TILE_COLUMNS}"


GRIDS = tuple(IntegerGrid(bits, group) for bits in (8, 4) for group in (None, 128, 64, 32))
_BY_BYTES = {TILE_BYTES: None} | {grid.tile_bytes: grid for grid in GRIDS}


def grid_of(packed: Packed) -> IntegerGrid | None:
    """None of a matrix of full width."""
    return None if packed.bits is None else IntegerGrid(packed.bits, packed.group)


def is_tile(length: int) -> bool:
    """Whether some layout has tiles of ``length`` bytes."""
    # (a symbolic size, which a tracer may give, can be compared and not looked up)
    return any(length == known for known in _BY_BYTES)


def grid_in(fragments: Tensor) -> IntegerGrid | None:
    """Of fragments [row tiles, column tiles, …]; None where they are of full width, or of no layout."""
    length = fragments.shape[-1] * fragments.element_size()
    return next((grid for known, grid in _BY_BYTES.items() if length == known), None)


def pack_fragments(packed: Packed) -> Tensor:
    """A packed24 matrix of a 16-bit dtype, of full width or of integers: uint8 [row tiles, column tiles, bytes]."""
    grid = grid_of(packed)
    if grid is None or packed.scales is None:
        return to_fragments(packed)
    high, wide = tiles(*packed.shape)
    values = packed.values if grid.bits == 8 else unpack_nibbles(packed.values)
    values = filled(values, high * TILE_ROWS, wide * TILE_COLUMNS // 2, 0)
    codes = filled(packed.codes, high * TILE_ROWS, wide * TILE_COLUMNS // 8, EMPTY_CODES)
    out = torch.empty(high, wide, grid.tile_bytes, dtype=torch.uint8, device=values.device)
    held, coded, scaled = _parts(out, grid)
    # The lanes of :func:`to_fragments`.     rows: tile, half, g   columns: tile, chunk, pair, o, t1, value
    source = values.reshape(high, 2, 8, wide, CHUNKS, 2, 2, 2, 2)
    if grid.bits == 8:
        #   to tile, tile, chunk, (g, t1, pair), o, value, half
        ordered = source.permute(0, 3, 4, 2, 7, 5, 6, 8, 1).reshape(high, wide, CHUNKS, LANES, -1)
    else:
        #   to tile, tile, chunk, (g, t1, pair), value, o, half
        ordered = source.permute(0, 3, 4, 2, 7, 5, 8, 6, 1).reshape(high, wide, CHUNKS, LANES, -1)
        ordered = pack_nibbles(ordered + _MIDDLE)
    together = CHUNKS // (grid.bits // 2)
    ordered = ordered.unflatten(2, (-1, together)).transpose(3, 4)
    held.copy_(ordered.reshape(high, wide, -1).view(torch.uint8))
    place_codes(coded.view(high, wide, LANES, 16), codes)
    scales = packed.scales.expand(-1, wide) if grid.group is None else packed.scales
    scales = filled(scales, high * TILE_ROWS, wide * grid.scales, 0).view(high, 2, 8, wide, grid.scales)
    scaled.copy_(scales.permute(0, 3, 2, 4, 1).reshape(high, wide, -1).view(torch.uint8))
    return out


def unpack_fragments(fragments: Tensor, dtype: torch.dtype, rows: int, columns: int) -> Packed:
    """Undo :func:`pack_fragments`, bit for bit; ``dtype``: of the matrix."""
    grid = grid_in(fragments)
    if grid is None:
        return from_fragments(fragments, dtype, rows, columns)
    high, wide = tiles(rows, columns)
    held, coded, scaled = _parts(fragments.view(torch.uint8), grid)
    together = CHUNKS // (grid.bits // 2)
    ordered = held.reshape(high, wide, CHUNKS // together, LANES, together, -1).transpose(3, 4)
    if grid.bits == 8:
        placed = ordered.reshape(high, wide, CHUNKS, 8, 2, 2, 2, 2, 2).view(torch.int8)
        #   tile, tile, chunk, g, t1, pair, o, value, half  ->  tile, half, g, tile, chunk, pair, o, t1, value
        values = placed.permute(0, 8, 3, 1, 2, 5, 6, 4, 7)
    else:
        nibbles = (unpack_nibbles(ordered.reshape(high, wide, CHUNKS, LANES, -1)) & 15) - _MIDDLE
        placed = nibbles.reshape(high, wide, CHUNKS, 8, 2, 2, 2, 2, 2)
        #   tile, tile, chunk, g, t1, pair, value, o, half  ->  the same
        values = placed.permute(0, 8, 3, 1, 2, 5, 7, 4, 6)
    full = padded(columns)
    values = values.reshape(high * TILE_ROWS, -1)[:rows, : full // 2].contiguous()
    codes = placed_codes(coded.reshape(high, wide, LANES, 16))[:rows, : full // 8].contiguous()
    words = scaled.contiguous().view(dtype).view(high, wide, 8, grid.scales, 2)
    scales = words.permute(0, 4, 2, 1, 3).reshape(high * TILE_ROWS, -1)
    count = 1 if grid.group is None else -(-columns // grid.group)
    return Packed(
        "packed24",
        (rows, columns),
        values if grid.bits == 8 else pack_nibbles(values),
        codes,
        scales[:rows, :count].contiguous(),
        grid.bits,
        grid.group,
    )


def _parts(fragments: Tensor, grid: IntegerGrid) -> tuple[Tensor, Tensor, Tensor]:
    """Values, codes and scales of every tile, as they lie there."""
    values = grid.bits // 2 * _CHUNK_BYTES
    sizes = [values, _CHUNK_BYTES, fragments.shape[-1] - values - _CHUNK_BYTES]
    held, coded, scaled = fragments.split(sizes, -1)
    return held, coded, scaled
