"""Convolutions as linear sites: what a kernel sees at one place is a row of inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sparsify.errors import Refused
from sparsify.ir.operators import argument


@dataclass(frozen=True)
class Window:
    """How a kernel is laid over its input, per spatial dimension.

    ``depthwise``: each channel has a kernel [1, size] of its own, as each expert of a stack has a matrix.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    depthwise: bool

    def rows(self, value: Tensor) -> Tensor:
        """``value`` [batch, channels, *space] as [places, channels · size], or depth-wise [channels, places, size]."""
        # One spatial dimension is a picture of height one.
        two = len(self.kernel) == 2
        columns = torch.nn.functional.unfold(
            value if two else value.unsqueeze(2),
            self._pair(self.kernel, 1),
            self._pair(self.dilation, 1),
            self._pair(self.padding, 0),
            self._pair(self.stride, 1),
        )
        if not self.depthwise:
            return columns.transpose(1, 2).flatten(0, 1)
        parts = columns.unflatten(1, (value.shape[1], -1))
        return parts.permute(1, 0, 3, 2).flatten(1, 2)

    def _pair(self, values: tuple[int, ...], one: int) -> tuple[int, int]:
        return (values[0], values[1]) if len(values) == 2 else (one, values[0])


def window_of(node: fx.Node) -> Window | Refused:
    """The window of a convolution, or why its weight is not a matrix over one."""
    weight, x = node.args[1], node.args[0]
    assert isinstance(weight, fx.Node) and isinstance(x, fx.Node)
    kernel = tuple(int(k) for k in weight.meta["val"].shape[2:])
    groups = int(argument(node, 6, "groups", 1))
    padding = argument(node, 4, "padding", 0)
    channels = x.meta["val"].shape[1 if x.meta["val"].dim() == len(kernel) + 2 else 0]
    if isinstance(padding, str):
        return Refused(f"a convolution with padding '{padding}'", node.name)
    if len(kernel) > 2:
        return Refused(f"a {'×'.join(map(str, kernel))} convolution in three dimensions", node.name)
    depthwise = groups == channels == weight.meta["val"].shape[0] and groups > 1
    if groups != 1 and not depthwise:
        return Refused(f"a convolution in {groups} groups", node.name)
    spread = [
        _spread(argument(node, i, n, d), len(kernel))
        for i, n, d in ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))
    ]
    return Window(kernel, spread[0], spread[1], spread[2], depthwise)


def _spread(value: Any, dimensions: int) -> tuple[int, ...]:
    values = [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(value)]
    return tuple(values * dimensions if len(values) == 1 else values)
