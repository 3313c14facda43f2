"""Packed weights of 8 and 4 bits beside those of full width: the rows Q of ``bench_cpu.py``.

Random bytes are weights here: no value of them changes the time. Of each candidate as many copies as 130 MB hold.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsify.runtime import ops
from sparsify.runtime.codes import pack_bits
from sparsify.runtime.layout import pack

SHAPES = ((4096, 4096), (11008, 4096))
TOKENS = (1, 4, 16)
_Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Candidate:
    """``bits`` 16: bfloat16. ``over``: whose times its own are held against; ``bar``: by what ratio at one token."""

    layout: str
    bits: int
    group: int
    over: str
    bar: float = 0.0

    @property
    def label(self) -> str:
        if self.bits == 16:
            return f"{self.layout} bf16"
        return f"{self.layout} int{self.bits} {f'g{self.group}' if self.group else 'row'}"


CANDIDATES = (
    Candidate("dense", 16, 0, "2:4 bf16"),
    Candidate("2:4", 16, 0, "2:4 bf16"),
    Candidate("2:4", 8, 64, "2:4 bf16", 1.6),
    Candidate("2:4", 8, 0, "2:4 bf16", 1.6),
    Candidate("2:4", 4, 64, "dense int4 g64", 1.25),
    Candidate("dense", 8, 64, "2:4 bf16"),
    Candidate("dense", 4, 64, "2:4 bf16"),
    Candidate("bitmask", 8, 64, "2:4 bf16"),
    Candidate("bitmask", 4, 64, "dense int4 g64"),
)


def measure(rows: int, columns: int, rounds: int, interleaved: Callable[..., Any]) -> list[dict[str, Any]]:
    """Every candidate for each number of tokens."""
    made = {c.label: _copies(c, rows, columns) for c in CANDIDATES}
    found = []
    for tokens in TOKENS:
        x = torch.randn(tokens, columns).bfloat16()
        times = interleaved({label: [_of(call, x) for call in calls] for label, (calls, _) in made.items()}, rounds)
        for c in CANDIDATES:
            ratios = sorted(a / b for a, b in zip(times[c.over], times[c.label], strict=True))
            size, least = made[c.label][1], min(times[c.label])
            found.append(
                {
                    "case": "Q",
                    "label": f"{rows}×{columns} {c.label}, {tokens} tokens",
                    "over": c.over,
                    "ratio": statistics.median(ratios),
                    "low": ratios[0],
                    "high": ratios[-1],
                    "of_minima": min(times[c.over]) / least,
                    "bar": c.bar if tokens == 1 else 0.0,
                    "bytes": made[c.over][1] / size,
                    "milliseconds": 1e3 * statistics.median(times[c.label]),
                    "least_milliseconds": 1e3 * least,
                    "gigabytes_per_second": size / least / 1e9,
                }
            )
    return found


def described(row: dict[str, Any]) -> str:
    verdict = "" if row["ratio"] >= row["bar"] else f"  BELOW the bar of {row['bar']}"
    return (
        f"Q {row['label']}: {row['ratio']:.2f}× [{row['low']:.2f} … {row['high']:.2f}] of {row['over']} (minima "
        f"{row['of_minima']:.2f}×, bytes {row['bytes']:.2f}×); {row['milliseconds']:.3f} ms, at least "
        f"{row['least_milliseconds']:.3f}, {row['gigabytes_per_second']:.1f} GB/s{verdict}"
    )


def _of(call: _Call, x: Tensor) -> Callable[[], Tensor]:
    return lambda: call(x)


def _copies(c: Candidate, rows: int, columns: int) -> tuple[list[_Call], int]:
    """Calls of weights that lie in different places, and the bytes of one."""
    call, tensors = _made(c, rows, columns)
    size = sum(t.nbytes for t in tensors)
    held = [tensors, *([t.clone() for t in tensors] for _ in range(max(2, math.ceil(130e6 / size) - 1)))]
    return [_bound(call, own) for own in held], size


def _bound(call: Callable[..., Tensor], tensors: list[Tensor]) -> _Call:
    return lambda x: call(x, *tensors)


def _made(c: Candidate, rows: int, columns: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The product of one candidate, and the tensors of its weights."""
    if c.bits == 16:
        dense = torch.randn(rows, columns).bfloat16()
        if c.layout == "dense":
            return ops.linear_dense, [dense]
        dense.view(-1, 4)[:, ::2] = 0
        packed = pack(dense, "packed24")
        return ops.linear_24, [packed.values, packed.codes]
    scales = torch.rand(rows, columns // c.group if c.group else 1).bfloat16()
    if c.layout == "dense":
        return _few(ops.linear_dense_few, c), [scales, _integers(rows, columns * c.bits // 8, c.bits)]
    if c.layout == "2:4":
        pairs = torch.tensor([4, 8, 9, 12, 13, 14], dtype=torch.uint8)
        codes = [pairs[torch.randint(6, (rows, columns // 8))] for _ in range(2)]
        values = _integers(rows, columns // 2 * c.bits // 8, c.bits)
        return _few(ops.linear_24_few, c), [scales, values, codes[0] | codes[1] << 4]
    kept = torch.rand(rows, columns) < 0.5
    counts = kept.view(rows, -1, 64).sum(-1)
    lengths = (counts if c.bits == 8 else (counts + 1) // 2).sum(-1)
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    values = _integers(1, int(starts[-1]) + 64, c.bits).view(-1)
    return _few(ops.linear_bitmask_few, c), [scales, values, pack_bits(kept).view(torch.int32), starts]


def _few(operator: Callable[..., Tensor], c: Candidate) -> Callable[..., Tensor]:
    return lambda x, *tensors: operator(x, *tensors, c.bits, c.group, False)


def _integers(rows: int, length: int, bits: int) -> Tensor:
    return torch.randint(256, (rows, length), dtype=torch.uint8).view(torch.int8 if bits == 8 else torch.uint8)
