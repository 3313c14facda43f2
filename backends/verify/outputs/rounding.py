"""What rounding alone makes of a model's outputs: much, where nearly equal candidates may change places."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# Other orders of a sum differ by about so much of its size.
_JITTER = 5e-7
_TRIES = 4

Feed = Mapping[str, Tensor]
Give = Callable[[Any, Feed], list[Tensor]]


def rounding_of(model: Any, feed: Feed, give: Give, differ: Callable[[list[Tensor], list[Tensor]], float]) -> float:
    """The greatest of the differences between ``give(model, feed)`` of a float32 model and what it gives in float64,
    and with weights that differ by a few units in their last place.
    """
    single = give(model, feed)
    others = []
    try:
        exact = {n: t.double() if t.is_floating_point() else t for n, t in feed.items()}
        others.append(give(copy.deepcopy(model).double(), exact))
    except Exception:  # its code asks for one dtype: then the other tries tell
        others.clear()
    for seed in range(_TRIES):
        near, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in near.parameters():
                if weight.is_floating_point():
                    weight.mul_(1 + _JITTER * torch.randn(weight.shape, generator=generator))
        others.append(give(near, feed))
    return max(differ(single, other) for other in others)
