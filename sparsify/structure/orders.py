"""Parameters in another order: what a reordering did to each, and a store that reads a model as if it had been done."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsify.errors import SpecError
from sparsify.ir.store import MemoryStore
from sparsify.ir.weights import Weights


@dataclass
class Order:
    """New positions along one axis of a parameter.

    Attributes:
        places: [stacks, size]; what comes to each position is what lay at places[…]. stack: the axis that counts
            matrices with an order of their own; None where there is one order, of shape [1, size].
    """

    axis: int
    stack: int | None
    places: Tensor

    def applied(self, value: Tensor) -> Tensor:
        if self.stack is None:
            return value.index_select(self.axis, self.places[0].to(value.device))
        result, axis = torch.empty_like(value), self.axis - (self.stack < self.axis)
        for number, places in enumerate(self.places):
            one = value.select(self.stack, number).index_select(axis, places.to(value.device))
            result.select(self.stack, number).copy_(one)
        return result


@dataclass
class Orders:
    """Of every parameter that was reordered, its orders; different axes, so that one does not touch another."""

    of: dict[str, list[Order]] = field(default_factory=dict)

    def at(self, name: str, axis: int, stack: int | None, shape: torch.Size) -> Order:
        """The order of an axis of a parameter, as it was if there is none yet."""
        for order in self.of.setdefault(name, []):
            if order.axis == axis:
                return order
        count = 1 if stack is None else shape[stack]
        self.of[name].append(Order(axis, stack, torch.arange(shape[axis]).repeat(count, 1)))
        return self.of[name][-1]

    def applied(self, name: str, value: Tensor) -> Tensor:
        for order in self.of.get(name, ()):
            value = order.applied(value)
        return value


def reordered(weights: Weights, orders: Orders) -> Weights:
    """``weights`` as they are after ``orders``; each is reordered when it is read."""
    names = {name: name for name in weights.parameters()}
    return Weights(MemoryStore(_Reordered(weights, orders)), names, aliases=weights.aliases)


@dataclass(frozen=True)
class _Reordered:
    weights: Weights
    orders: Orders

    def names(self) -> Iterable[str]:
        return self.weights.parameters()

    def shape(self, name: str) -> torch.Size:
        return self.weights.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.weights.dtype(name)

    def read(self, name: str) -> Tensor:
        return self.orders.applied(name, self.weights.read(name))

    def write(self, name: str, tensor: Tensor) -> None:
        raise SpecError(f"writing {name}", found="weights that are only read", do="Write to an output")
