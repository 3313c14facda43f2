"""Inputs that names and sizes do not tell: data, by model type.

An input is ("ids", *shape), ("normal", *shape), ("ones", *shape), ("zeros", *shape), ("below", n, *shape) for whole
numbers from 0 to n - 1, or ("value", nested list).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_SERIES = {
    "past_values": ("normal", 2, 10), "past_time_features": ("normal", 2, 10, 2),
    "past_observed_mask": ("ones", 2, 10), "future_values": ("normal", 2, 4),
    "future_time_features": ("normal", 2, 4, 2),
}  # fmt: skip
GIVEN: dict[str, dict[str, tuple[Any, ...]]] = {
    "autoformer": _SERIES,
    "informer": _SERIES,
    "time_series_transformer": _SERIES,
    "dia": {"input_ids": ("ids", 2, 16), "decoder_input_ids": ("ids", 2, 16, 9)},
}


def draw(spec: tuple[Any, ...], low: int, high: int, generator: torch.Generator) -> Tensor:
    """The input that ``spec`` says; ids lie in [low, high)."""
    what, *shape = spec
    if what == "value":
        return torch.tensor(shape[0])
    if what in ("ones", "zeros"):
        return torch.full(shape, int(what == "ones"))
    if what == "normal":
        return torch.randn(*shape, generator=generator)
    low, high, shape = (0, shape[0], shape[1:]) if what == "below" else (low, high, shape)
    return torch.randint(low, high, shape, generator=generator)
