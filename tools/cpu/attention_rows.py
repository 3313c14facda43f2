"""Attention of one token beside torch's own: the rows A of ``bench_cpu.py``.

Keys and values lie in as many places as 130 MB hold, 64 at most, as other layers lie between two tokens of decoding.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sparsify.runtime import ops

# Heads of queries and of keys: Llama-3's, and as many of both (Llama-2).
HEADS, WIDTH = ((32, 8), (32, 32)), 128
POSITIONS = (16, 64, 256, 1024, 4096)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def measure(rounds: int, interleaved: Callable[..., Any]) -> list[dict[str, Any]]:
    found = []
    for heads, groups in HEADS:
        for name, dtype in DTYPES.items():
            for positions in POSITIONS:
                query = torch.randn(1, heads, 1, WIDTH).to(dtype)
                size = 2 * groups * positions * WIDTH * dtype.itemsize
                kept = torch.randn(min(64, max(3, math.ceil(130e6 / size))), 2, 1, groups, positions, WIDTH).to(dtype)
                times = interleaved(
                    {
                        "ours": [partial(_ours, query, key, value) for key, value in kept],
                        "torch": [partial(_torch, query, key, value) for key, value in kept],
                    },
                    rounds,
                )
                ratios = sorted(a / b for a, b in zip(times["torch"], times["ours"], strict=True))
                found.append(
                    {
                        "case": "A",
                        "label": f"{heads} heads over {groups}, {name}, {positions} positions",
                        "ratio": statistics.median(ratios),
                        "low": ratios[0],
                        "high": ratios[-1],
                        "microseconds": {who: 1e6 * statistics.median(seconds) for who, seconds in times.items()},
                        "gigabytes_per_second": size / min(times["ours"]) / 1e9,
                    }
                )
    return found


def described(row: dict[str, Any]) -> str:
    own, other = (row["microseconds"][who] for who in ("ours", "torch"))
    return (
        f"A {row['label']}: {row['ratio']:.2f}× [{row['low']:.2f} … {row['high']:.2f}] of torch; {own:.0f} µs for "
        f"{other:.0f}, {row['gigabytes_per_second']:.1f} GB/s"
    )


def _ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return ops.attend(query, key, value, None, WIDTH**-0.5)


def _torch(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, enable_gqa=key.shape[1] < query.shape[1])
