"""Whether onnxruntime gives back the weights of the checkpoint, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.backends.onnx.storage.pack import as_bits
from sparsify.backends.onnx.storage.store import GraphStore
from sparsify.backends.verify.result import Verification
from sparsify.backends.verify.runtime_weights import runtime_weights
from sparsify.errors import SparsifyError
from sparsify.files.ledger import Ledger
from sparsify.ir.store import TensorStore
from sparsify.tensors import digest


def check_equal(result: Verification, store: GraphStore, ledger: Ledger, checkpoint: TensorStore | None) -> None:
    """Compare every weight that onnxruntime gives with what it should be; what differs goes to ``result``."""
    rows = {row.name: row for row in result.weights}
    originals = _Originals(store, checkpoint, frozenset(ledger.tensors))
    unknown: list[str] = []
    try:
        for name, got in runtime_weights(store, [*store.names(), *store.inline()]):
            want = originals.find(name, got)
            if want is None:
                unknown += [name] if name in rows else []
                continue
            equal = _same(got, want)
            result.compared += 1
            if name in rows and rows[name].equal is not False:
                rows[name].equal = equal
            if not equal:
                result.problems.append(f"{name}: onnxruntime gives other values than the checkpoint holds")
    except SparsifyError as error:
        result.problems.append(str(error))
    if unknown:
        result.unchecked.append(
            f"{len(unknown)} weights have no tensor of that name or with these values to compare with: "
            f"{', '.join(unknown[:3])}{'…' if len(unknown) > 3 else ''}; name a checkpoint with --against"
        )


@dataclass
class _Originals:
    """What weights are compared with: the checkpoint where there is one, else the files that were written."""

    store: GraphStore
    checkpoint: TensorStore | None
    written: frozenset[str]
    _by_value: dict[str, str] | None = None

    def find(self, name: str, got: Tensor) -> Tensor | None:
        """What ``got``, called ``name`` in the graph, should be; None where nothing says it."""
        if self.checkpoint is None:
            return self.store.read(name) if name in self.written else None
        if name in set(self.checkpoint.names()):
            return self.checkpoint.read(name)
        if got.dim() < 2:
            return self.store.read(name) if name in self.written else None
        # A file that is not ours names weights as it likes: find them by their values.
        if self._by_value is None:
            self._by_value = {digest(self.checkpoint.read(n)): n for n in self.checkpoint.names()}
        sums = (digest(way) for way in either_way(got))
        match = next((self._by_value[each] for each in sums if each in self._by_value), None)
        return None if match is None else self.checkpoint.read(match)


def either_way(weight: Tensor) -> Iterator[Tensor]:
    """``weight`` and, of two axes and more, its transpose: a matrix that a MatMul reads may be stored either way."""
    yield weight
    if weight.dim() >= 2:
        yield weight.mT


def _same(got: Tensor, want: Tensor) -> bool:
    """Bit for bit after the graph's own cast."""
    bits = as_bits(want.to(got.dtype))
    return any(way.shape == want.shape and torch.equal(as_bits(way), bits) for way in either_way(got))
