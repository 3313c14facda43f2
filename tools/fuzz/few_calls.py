"""Sound arguments of the operators over values of 8 and 4 bits: random bytes, of which every one is a value."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

from sparsify.runtime import ops, reference
from sparsify.runtime.codes import unpack_bits
from sparsify.runtime.cpu.few import unpack_few
from sparsify.runtime.few_arguments import GROUPS, VALUES
from sparsify.runtime.words import Layout


def experts_bitmask_few(x: Tensor, scales: Tensor, values: Tensor, mask: Tensor, starts: Tensor, *rest: Any) -> Tensor:
    """The reference of each expert that has tokens: of the others nothing is read, whatever lies there."""
    (bits, group, exact, offsets), rows = rest, scales.shape[1]

    def product(e: int, part: Tensor) -> Tensor:
        own = starts[e * rows : (e + 1) * rows + 1]
        given = without_spares([part, scales[e], values, mask[e], own, bits, group, exact], ops.linear_bitmask_few)
        return reference.linear_bitmask_few(*given)

    return reference.by_expert(x, rows, offsets, product)


# Layout by layout: the operator of one matrix, that of a stack, and plain torch for both.
FEW: dict[Layout, tuple[Callable[..., Any], ...]] = {
    "packed24": (ops.linear_24_few, ops.experts_24_few, reference.linear_24_few, reference.experts_24_few),
    "bitmask": (
        ops.linear_bitmask_few,
        ops.experts_bitmask_few,
        reference.linear_bitmask_few,
        experts_bitmask_few,
    ),
    "dense": (ops.linear_dense_few, ops.experts_dense_few, reference.linear_dense_few, reference.experts_dense_few),
}
OPERATORS = tuple(operator for four in FEW.values() for operator in four[:2])
# Other numbers in the place of bits, groups and the choice of a way.
NUMBERS = (0, 1, 3, 4, 8, 16, 32, 64, 127, 128, -1, -(1 << 63), (1 << 63) - 1)
_PAIRS = torch.tensor([4, 8, 9, 12, 13, 14], dtype=torch.uint8)


def sound_few(draw: Random, rows: int, columns: int, dtype: torch.dtype, experts: int = 0) -> tuple[Layout, list[Any]]:
    """A layout, and what its operators take between x and the last argument; ``experts`` 0: one matrix."""
    layout, bits, group = draw.choice(list(FEW)), draw.choice((8, 4)), draw.choice(GROUPS)
    lead, full = (experts, rows) if experts else (rows,), -(-columns // 128) * 128
    scales = (torch.randn(*lead, -(-columns // group) if group else 1) / 8).to(dtype)
    if layout == "packed24":
        codes = [_PAIRS[torch.randint(6, (*lead, full // 8))] | _PAIRS[torch.randint(6, (*lead, full // 8))] << 4]
        values = _integers((*lead, full // 2 * bits // 8), bits)
    elif layout == "dense":
        codes, values = [], _integers((*lead, full * bits // 8), bits)
    else:
        kept = torch.rand(*lead, full) < draw.choice((0.0, 0.01, 0.5, 0.9, 1.0))
        weights = 1 << torch.arange(32)
        mask = (kept.view(*lead, -1, 32) * weights).sum(-1).to(torch.int32)
        codes = [mask, starts_of(mask.view(-1, full // 32), bits)]
        values = _integers((int(codes[1][-1]) + 64,), bits)
    return layout, [scales, values, *codes, bits, group, draw.random() < 0.5]


def starts_of(mask: Tensor, bits: int) -> Tensor:
    """The byte at which the values of each row of a mask [rows, words] begin."""
    counts = unpack_bits(mask.contiguous().view(torch.uint8)).view(len(mask), -1, 64).sum(-1)
    lengths = (counts if bits == 8 else (counts + 1) // 2).sum(-1)
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def unpacking(layout: Layout, width: int) -> Callable[..., Tensor]:
    def unpack(scales: Tensor, values: Tensor, *rest: Any) -> Tensor:
        codes, starts = (*rest[:-3], None, None)[:2]
        return unpack_few(layout, scales, values, codes, starts, rest[-3], rest[-2], width)

    return unpack


def without_spares(given: list[Any], operator: Any) -> list[Any]:
    """What plain torch takes in the place of ``given``: of a bitmask the values from the first start to what its mask
    counts, for what lies around them is nobody's.
    """
    if operator is not ops.linear_bitmask_few:
        return given
    values, mask, starts, bits = given[2:6]
    needed = int(starts_of(mask.reshape(-1, mask.shape[-1]), bits)[-1])
    return [*given[:2], values[int(starts[0]) :][: needed + 64], *given[3:]]


def slack(call: Any) -> float | None:
    """How far a product may be from plain torch's, beyond rounding: half of a 127th of the largest input a weight.

    None where numbers overflow, and in another order others do.
    """
    x, scales = (call.arguments[place].detach().double() for place in (0, 1))
    largest = [float(t[t.isfinite()].abs().max()) if bool(t.isfinite().any()) else 0.0 for t in (x, scales)]
    if not bool(scales.isfinite().all()) or largest[0] > 1e30 or largest[1] > 400:
        return None
    one_matrix = scales.dim() == 2
    exact = call.arguments[-2] or (one_matrix and x.numel() > 16 * x.shape[-1])
    return 0.0 if exact else largest[0] / 254 * largest[1] * (1 << call.arguments[-4] - 1) * x.shape[-1]


def _integers(shape: tuple[int, ...], bits: int) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8).view(VALUES[bits])
