"""``marlin-24`` of compressed-tensors: 2:4 weights of 4 or 8 bits, ordered for a kernel of that name.

Of W [out, in]: ``X.weight_packed`` int32 [in / 32, 16 · out · bits / 32], ``X.meta`` int16 [in / 32, 2 · out], which
two of each four inputs are kept, and ``X.scale_packed`` [groups, out]. The kept values, [in / 2, out] and made unsigned
by 2^(bits − 1), lie in tiles of 16 × 16, four of which the 32 lanes of a warp share out; the places are in the order of
the kernel's sparse products. Source: ``marlin_24.py``, ``permutations_24.py`` and ``semi_structured_conversions.py`` of
compressed-tensors 0.9.4, which has no way back; vLLM's kernel went with its pull request 36799.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import CheckpointError
from sparsify.quantized.dense import FLOATS, Dense, Layout, Tensors, part, refused

FORMAT = "marlin-24"
_TILE = 16
# In which order the bits of a word are filled, so that one mask takes out numbers that are used together.
_INTERLEAVED = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}
# Rows of a matrix come in so many: a warp takes those of four tiles.
_ROWS = 64
_ENDS = (".weight_packed", ".scale_packed", ".meta")


def find(tensors: Tensors, config: Mapping[str, Any], where: str) -> Layout:
    """Args:
        config: ``config_groups``, of which each says the bits of its weights.

    Raises:
        CheckpointError: bits that there are not, or parts that are missing or of another shape.
    """
    known = set(tensors.names())
    kinds = {group.get("weights", {}).get("num_bits") for group in config["config_groups"].values()}
    if len(kinds) != 1 or not kinds <= set(_INTERLEAVED):
        raise refused(where, f"{FORMAT} of {sorted(map(str, kinds))} bits, of which 4 and 8 are read")
    (bits,) = kinds
    dense = {}
    for base in sorted({n.rpartition(".")[0] for n in known if n.endswith(_ENDS)}):
        name = f"{base}.weight"
        scale = part(tensors, known, f"{base}.scale_packed", name, FLOATS)
        packed = part(tensors, known, f"{base}.weight_packed", name, (torch.int32,))
        shapes = tensors.shape(scale), tensors.shape(packed)
        if any(len(shape) != 2 for shape in shapes):
            raise refused(where, f"{name} of the parts {[list(shape) for shape in shapes]}, which are no matrices")
        (groups, rows), (height, width) = shapes
        columns = height * 2 * _TILE
        if rows % _ROWS or width != rows * _TILE * bits // 32 or not groups or columns % groups:
            raise refused(
                where, f"{name} of the parts {[list(shape) for shape in shapes]}, which is none of {bits} bits"
            )
        meta = part(tensors, known, f"{base}.meta", name, (torch.int16,), [(columns // 32, 2 * rows)])
        made = partial(_make, bits=bits, shape=(rows, columns))
        dense[name] = Dense({"values": packed, "meta": meta, "scale": scale}, torch.Size((rows, columns)), made)
    return Layout(f"{FORMAT} of compressed-tensors", dense)


def _make(parts: Mapping[str, Tensor], dtype: torch.dtype, *, bits: int, shape: tuple[int, int]) -> Tensor:
    rows, columns = shape
    kept = _unpacked(parts["values"], bits, columns // 2, rows).t()
    codes = parts["meta"].flatten()[_places(rows, columns // 16)].view(torch.uint8)
    # A nibble has the places of two of four inputs, the lower one in its lower bits.
    places = (codes.unsqueeze(-1) >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8) & 3).flatten(1).long()
    if not bool((places[:, ::2] < places[:, 1::2]).all()):
        raise CheckpointError(
            "a weight of Marlin-24", found="places that are no two of four", do="The file is damaged: fetch it again"
        )
    index = places + torch.arange(columns // 2) // 2 * 4
    whole = torch.zeros(rows, columns).scatter_(1, index, kept.float())
    scale = parts["scale"].float()
    # Scales of groups are in the order of the kernel's lanes, those of whole rows in their own; and, as who wrote them
    # counted the kept columns alone, those of groups of half a row too.
    if len(scale) > 1 and columns // len(scale) < columns // 2:
        scale = scale.reshape(-1, 4, 2).transpose(1, 2).reshape(scale.shape)
    each = scale.t().repeat_interleave(columns // len(scale), dim=1)
    return whole.mul_(each).to(dtype)


def _places(rows: int, words: int) -> Tensor:
    """Where the codes of each row lie, [rows, words] of 16 inputs each: rows dealt out in 64s, then 2 × 2 blocks
    turned, then pairs of words for all rows one after the other."""
    row, word = torch.arange(rows).unsqueeze(1), torch.arange(words).unsqueeze(0)
    row = row // 64 * 64 + row % 2 * 2 + row % 8 // 4 + row % 4 // 2 * 32 + row % 64 // 8 * 4
    turned = ((row % 2 == 0) & (word % 2 == 1)).long() - ((row % 2 == 1) & (word % 2 == 0)).long()
    row, word = row + turned, word - turned
    return word // 2 * rows * 2 + row * 2 + word % 2


def _unpacked(words: Tensor, bits: int, height: int, width: int) -> Tensor:
    """The signed numbers [height, width] in ``words``."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    numbers = (words.unsqueeze(-1) >> shifts & ((1 << bits) - 1)).flatten(1)
    order = _order(bits)
    in_tiles = torch.empty_like(numbers).view(-1, len(order))
    in_tiles[:, order] = numbers.view(-1, len(order))
    tiles = in_tiles.view(height // _TILE, width // _TILE, _TILE, _TILE)
    return tiles.transpose(1, 2).reshape(height, width) - (1 << (bits - 1))


def _order(bits: int) -> Tensor:
    """Which of four tiles' numbers, one tile after the other, each of those in the words is."""
    lane = torch.arange(32).view(32, 1, 1, 1)
    column, half = torch.arange(4).view(1, 4, 1, 1), torch.arange(2).view(1, 1, 2, 1)
    row = 2 * (lane % 4) + torch.tensor([0, 1, 8, 9])
    place = 16 * row + 256 * (lane // 8) + 8 * (lane // 4 % 2) + 4 * half + column
    return place.reshape(-1, 32 // bits)[:, list(_INTERLEAVED[bits])].flatten()
