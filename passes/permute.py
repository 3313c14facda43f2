"""Permute: channels change places before N:M zeros, so that a group of M holds no more large weights than N.

The hidden channels of an MLP, and those of a head's values, may lie in any order: the matrix that makes them and the
one that reads them are permuted alike, and the model's function is the same (Pool & Yu, "Channel permutations for N:M
sparsity", NeurIPS 2021). What an order is worth is what N:M keeps of the matrices that read the channels:

    K = Σ_rows Σ_groups (the N largest of the group's M entries of |W|²·‖X‖²)

the squares of Wanda's metric (2306.11695): what a kept weight adds to the output's energy, were inputs uncorrelated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsify.method.channel_pass import ChannelPass
from sparsify.method.pattern import NM
from sparsify.passes.solvers.grouping import kept, search


@dataclass(frozen=True)
class Permute(ChannelPass):
    """Order channels so that the pattern keeps most of |W|²·‖X‖².

    >>> from sparsify.method.spec import parse_pass, spec_text
    >>> spec_text(parse_pass("permute:2:4"))
    'permute:2:4'
    """

    name: ClassVar[str] = "permute"
    summary: ClassVar[str] = "channels of MLPs and heads reordered for N:M, the function unchanged; before other passes"
    when: ClassVar[str] = "before any N:M pass: the same pattern then keeps more, and the model computes the same"
    example: ClassVar[str] = "permute:2:4"

    def worth(self, weight: Tensor, squared_norm: Tensor) -> Tensor:
        return weight.square() * squared_norm

    def kept(self, worth: Tensor) -> float:
        return kept(worth, *self._pattern())

    def order(self, worth: Tensor, seed: int) -> Tensor:
        return search(worth, *self._pattern(), seed)

    def _pattern(self) -> tuple[int, int]:
        assert isinstance(self.pattern, NM)
        return self.pattern.n, self.pattern.m
