"""A packed weight and a dense copy of it, for the numbers of tokens for which vLLM's own dense product is faster here.

Only where ``policy`` asks for it (:mod:`.asked`): the copy takes what the dense model takes. Which numbers those are is
measured once per shape and machine, when weights have been loaded, and kept in the cache folder.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
import vllm
from torch import Tensor, nn
from torch.library import Library, register_fake
from vllm.logger import init_logger
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

from sparsify.backends.packed.loaded.known import Known, key_of
from sparsify.runtime.cpu.stopwatch import Stopwatch
from sparsify.runtime.cpu.turns import are_turns, dense_is_faster, in_words, measure_turns
from sparsify.runtime.cpu.unpacking import unpacked
from sparsify.runtime.packed_weight import PackedWeight

logger = init_logger(__name__)

# Operators take tensors alone; what they stand for lives as long as the layer that holds it.
_numbers = itertools.count()
_here: WeakValueDictionary[int, Beside] = WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class Beside:
    """Two products with one weight.

    Attributes:
        turns: the numbers of tokens at which the faster one changes (:mod:`sparsify.runtime.cpu.turns`).
        place: what the operator finds this by, a tensor: a number would be written into compiled graphs.
    """

    packed: PackedWeight
    dense: Callable[[Tensor], Tensor]
    turns: tuple[int, ...]
    place: Tensor = field(default_factory=lambda: torch.tensor(next(_numbers)))

    def __post_init__(self) -> None:
        _here[int(self.place)] = self

    def linear(self, x: Tensor) -> Tensor:
        """``x`` [..., in_features] times the one or the other."""
        if dense_is_faster(self.turns, x.numel() // x.shape[-1]):
            return self.dense(x)
        return self.packed.linear(x)


_library = Library("sparsify_vllm", "DEF")
_library.define("linear_beside(Tensor x, Tensor place, int rows, Tensor? bias=None) -> Tensor")


def _run(x: Tensor, place: Tensor, rows: int, bias: Tensor | None = None) -> Tensor:
    y = _here[int(place)].linear(x)
    return y if bias is None else y + bias


def _fake(x: Tensor, place: Tensor, rows: int, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


_library.impl("linear_beside", _run, "CompositeExplicitAutograd")
register_fake("sparsify_vllm::linear_beside", _fake, lib=_library)
linear_beside = torch.ops.sparsify_vllm.linear_beside.default


class Copies:
    """Dense copies beside the packed weights of one engine."""

    def __init__(self) -> None:
        threads = torch.get_num_threads()
        self._alone = threads == 1
        self._known = Known("turns.json", "turns", are_turns, threads=str(threads), vllm=vllm.__version__)
        self._told: set[str] = set()

    def beside(self, name: str, weight: PackedWeight) -> Beside | None:
        """``weight`` and its copy; None where no number of tokens is faster dense, and no copy is kept.

        Args:
            name: for what is told.
        """
        dense = dense_product(unpacked(weight.packed, weight.starts))
        rows, columns = weight.packed.shape
        key = key_of(weight.packed, exact=weight.exact)
        turns = self._known.of(key, lambda: self._measured(weight, dense))
        self._known.keep()
        if key not in self._told:
            self._told.add(key)
            copy = f"a dense copy of {rows * columns * weight.dtype.itemsize / (1 << 20):.1f} MiB stands beside each"
            logger.info(
                "sparsify: %s (%s): dense is faster here for %s; %s",
                name,
                key,
                in_words(turns),
                copy if turns else "no copy is kept",
            )
        return Beside(weight, dense, tuple(turns)) if turns else None

    def _measured(self, weight: PackedWeight, dense: Callable[[Tensor], Tensor]) -> list[int]:
        # One thread is measured by its own CPU time, which other programs hardly change. What empties the caches is as
        # large as many a weight: it goes again.
        watch = Stopwatch(alone=self._alone)
        return measure_turns(weight.linear, dense, weight.columns, weight.dtype, watch)


def dense_product(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """What vLLM multiplies with dense [out_features, in_features] on this CPU, without a bias."""
    holder: Any = nn.Module()
    holder.weight = nn.Parameter(weight, requires_grad=False)
    # It lays the weight out anew and lets the first go.
    dispatch_cpu_unquantized_gemm(holder, remove_weight=True)

    def product(x: Tensor) -> Tensor:
        y: Tensor = holder.cpu_linear(x, holder.weight, None)
        return y

    return product
