"""Calibration batches through the graph, once with the weights as they are pruned and, where a pass asks, once dense.

The dense stream runs the same regions over the same batches a moment before the pruned one, so that every statistic of
two inputs (``cross_gram``) sees the same token in both models. Of the dense stream only rows are kept, in a store
with a budget; both streams follow the memory of one region.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, fx

from sparsify.analysis.flow import Flow
from sparsify.analysis.linear import InputGroup
from sparsify.calibration.activations import ActivationStore
from sparsify.calibration.interpreter import Interpreter, OnValue, Region
from sparsify.calibration.recorder import GroupRecorder
from sparsify.calibration.rows import RowReader
from sparsify.context import Context
from sparsify.errors import CalibrationError
from sparsify.ir.program import Program
from sparsify.ir.weights import Weights

Recorders = Mapping[fx.Node, Sequence[tuple[InputGroup, GroupRecorder]]]


class Streams:
    """The pruned stream and, with ``dense`` weights, the dense one beside it. A context manager.

    Args:
        context: its memory is that of both streams.
        dense: weights of the dense model; None for one stream.
        first: which of all batches the first of ``batches`` is, as errors name them.
    """

    def __init__(
        self,
        program: Program,
        flow: Flow,
        rows: RowReader,
        batches: Sequence[Mapping[str, Tensor]],
        context: Context,
        dense: Weights | None = None,
        *,
        first: int = 0,
    ) -> None:
        self.first = first
        self.batches, self.rows, self.device = batches, rows, context.device
        self._stack = ExitStack()
        share = context.memory if dense is None else context.memory // 3
        store, self._kept = ActivationStore(share, self.device), ActivationStore(share, self.device)
        self._stores = [store, self._kept]
        # Of each group in each batch that has run in this region, whether its rows were finite.
        self._finite: list[tuple[int, str, Tensor]] = []
        self.runner = Interpreter(program, flow, batches, store, self.device, first=first)
        self.dense: Interpreter | None = None
        if dense is not None:
            self._stores.append(ActivationStore(share, self.device))
            original = dataclasses.replace(program, weights=dense)
            self.dense = Interpreter(original, flow, batches, self._stores[-1], self.device, first=first)

    def __enter__(self) -> Streams:
        for store in self._stores:
            self._stack.enter_context(store)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    @property
    def runners(self) -> dict[str, Interpreter]:
        """The interpreter of each stream."""
        return {"pruned": self.runner, **({"dense": self.dense} if self.dense is not None else {})}

    def skip(self, region: Region) -> None:
        """Do not run ``region``, which another run of this program has run."""
        for runner in self.runners.values():
            runner.skip(region)

    def run_region(self, region: Region, recorders: Recorders, after_batch: Callable[[], None] | None = None) -> None:
        """Run ``region`` on every batch; rows at the nodes of ``recorders`` are recorded.

        Raises:
            CalibrationError: an input that is not finite (the site is named), or rows that cannot be read.
        """
        if self.dense is not None:
            self.dense.run_region(region, watch=recorders, on_value=self._keep(recorders))
        self.runner.run_region(region, watch=recorders, on_value=self._record(recorders), after_batch=after_batch)
        self._check_finite()

    def _keep(self, recorders: Recorders) -> OnValue:
        def keep(batch: int, node: fx.Node, values: Mapping[fx.Node, Any]) -> None:
            for group, _ in recorders[node]:
                found = self.rows.read(group, self.batches[batch], values)
                for name, value in zip(("rows", "ends", "tokens"), found, strict=True):
                    self._kept.put(batch, f"{group.name} {name}", value)

        return keep

    def _record(self, recorders: Recorders) -> OnValue:
        def record(batch: int, node: fx.Node, values: Mapping[fx.Node, Any]) -> None:
            for group, recorder in recorders[node]:
                rows, ends, tokens = self.rows.read(group, self.batches[batch], values)
                dense = None
                if self.dense is not None:
                    # Where rows end is a matter of the CPU.
                    places = {"rows": self.device, "ends": torch.device("cpu"), "tokens": self.device}
                    kept: list[Any] = [self._kept.take(batch, f"{group.name} {n}", on) for n, on in places.items()]
                    dense = paired(group.name, (rows, ends, tokens), (kept[0], kept[1], kept[2]))
                self._finite.append((batch, group.name, recorder.update(rows, ends, dense)))

        return record

    def _check_finite(self) -> None:
        """Once a region: a GPU that is asked after every batch stands still meanwhile."""
        seen, self._finite = self._finite, []
        found = torch.stack([finite for *_, finite in seen]).tolist() if seen else []
        for (batch, name, _), finite in zip(seen, found, strict=True):
            if not finite:
                raise CalibrationError(
                    f"the input of {name}",
                    found=f"NaN or infinity in calibration batch {self.first + batch}",
                    do="Look at the weights before this site; where float16 overflows take --compute-dtype float32",
                )


Read = tuple[Tensor, Tensor | None, Tensor | None]


def paired(name: str, pruned: Read, dense: Read) -> Tensor:
    """The dense model's row for each row of the pruned model: [tokens, in_features]; where rows end is on the CPU.

    Experts are chosen by each model for itself. A token that both send to one expert is paired there; one that
    only the pruned model sends there has no dense row, and stands for itself.

    Raises:
        CalibrationError: the rows of an expert cannot be told apart by token.
    """
    rows, ends, tokens = pruned
    other, other_ends, other_tokens = dense
    if ends is None or other_ends is None or (torch.equal(ends, other_ends) and tokens is None):
        return other
    if tokens is None or other_tokens is None:
        raise CalibrationError(
            f"target=dense at {name}",
            found="experts whose rows cannot be traced back to tokens",
            do="Leave these experts out with --ignore, or use target=pruned",
        )
    span = torch.maximum(tokens.max(), other_tokens.max()) + 1
    keys = _expert_of(ends, len(rows)).to(tokens, non_blocking=True) * span + tokens
    known = _expert_of(other_ends, len(other)).to(other_tokens, non_blocking=True) * span + other_tokens
    order = known.argsort()
    at = torch.searchsorted(known[order], keys).clamp(max=len(known) - 1)
    found = order[at]
    return torch.where((known[found] == keys).unsqueeze(1), other[found], rows)


def _expert_of(ends: Tensor, rows: int) -> Tensor:
    return torch.searchsorted(ends, torch.arange(rows), right=True)
