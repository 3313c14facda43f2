"""Distillation: the teacher's predictions as what is learnt, without the teacher in memory.

The teacher reads every sequence that will be trained on once, block by block for all of them, as an evaluation does, so
that memory holds one of its blocks. Its last hidden values are kept, in memory up to the context's budget and past it
in a file without a name; its logits are made again of them, one sequence at a time, whenever that is trained on. A
resident teacher would read each sequence again in every epoch, and lie in memory meanwhile.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sparsify.analysis.flow import Flow
from sparsify.analysis.linear import block_starts, find_sites
from sparsify.calibration.activations import ActivationStore
from sparsify.calibration.interpreter import Region
from sparsify.calibration.loss import logits_node
from sparsify.context import Context, Progress
from sparsify.errors import CalibrationError
from sparsify.frontend.capture import capture
from sparsify.frontend.source import Source
from sparsify.host import within_memory
from sparsify.ir.program import Program
from sparsify.method.divergence import divergence
from sparsify.precision import exact_products
from sparsify.quality.perplexity import Windows
from sparsify.refine.fitter import Fitter
from sparsify.refine.regions import alive, smallest
from sparsify.tensors import all_finite


class Distillation:
    """The teacher's part in the loss of sequences; see :meth:`of`."""

    def __init__(
        self, teacher: Source, ids: Tensor, numbers: Tensor, share: float, context: Context, store: ActivationStore
    ) -> None:
        self.name, self.share, self._context = teacher.name, share, context
        self._place = {number: place for place, number in enumerate(numbers.tolist())}
        with within_memory(f"the teacher {teacher.name}", context.device):
            batches = Windows(ids[numbers], 1, teacher)
            program = capture(teacher, batches[0])
            self._split = _Split.of(program)
            self._fitter = Fitter(program, Flow.of(program), batches, store, context.device)
            self._read()
            stop = self._split.stop
            self._work = self._fitter.prepare(self._split.cut, stop, stop)
        # Of each sequence since the last check, whether the teacher's logits were numbers.
        self._finite: list[tuple[int, Tensor]] = []

    @classmethod
    @contextmanager
    def of(
        cls, teacher: Source, ids: Tensor, numbers: Tensor, share: float, context: Context
    ) -> Iterator[Distillation]:
        """Let the teacher read; what it gave is kept meanwhile.

        Args:
            numbers: which of ``ids`` [sequences, length] will be trained on.
            share: of the divergence in the loss; of cross-entropy the rest.

        Raises:
            CalibrationError: hidden values of the teacher that are NaN or infinite; too little memory.
        """
        with ActivationStore(context.memory, context.device) as store:
            yield cls(teacher, ids, numbers, share, context, store)

    def loss(self, logits: Tensor, ids: Tensor, numbers: Tensor) -> Tensor:
        """The mean loss of a batch, a scalar in float32.

        Args:
            logits: [batch, length, vocabulary] of the student. ids: [batch, length]. numbers: [batch], which sequences
                they are.
        """
        chosen = numbers.tolist()

        def teach(row: int) -> Tensor:
            with torch.no_grad():
                found = self._fitter.give(self._work, self._place[chosen[row]], self._split.logits)[0]
                # Of a wider teacher the further ones are padding; see :func:`sparsify.tuning.teacher.known`.
                found = found[:, : logits.shape[-1]]
            self._finite = [*self._finite[-255:], (chosen[row], found.isfinite().all())]
            return found

        return divergence(logits, teach, ids=ids, share=self.share)

    def check(self, step: int) -> None:
        """Raises:
        CalibrationError: the teacher's logits are what is no number. Asked where a loss is not.
        """
        for number, finite in self._finite:
            if not bool(finite):
                raise CalibrationError(
                    f"distilling from {self.name}, step {step + 1}",
                    found=f"logits of the teacher that are NaN or infinite in sequence {number}",
                    do="Give another teacher; float16 ends at 65504: convert it to bfloat16",
                )

    @exact_products()
    def _read(self) -> None:
        cut, stop, flow = self._split.cut, self._split.stop, self._fitter.flow
        last = {node for node in flow.live(cut, stop) if isinstance(node.meta.get("val"), Tensor)}
        cuts = sorted({0, *(at for at in block_starts(self._fitter.program, flow) if at < cut), cut})
        found: list[tuple[int, bool]] = []

        def look(index: int, node: fx.Node, values: Mapping[fx.Node, Any]) -> None:
            if values[node].is_floating_point():
                found.append((index, all_finite(values[node])))

        with torch.no_grad():
            for number, (start, end) in enumerate(itertools.pairwise(cuts)):
                watch = last if end == cut else ()
                self._fitter.run_region(Region(start, end, stop), watch=watch, on_value=look)
                self._context.observe(Progress("teaching", number + 1, len(cuts) - 1, self.name, "layer"))
        broken = [index for index, finite in found if not finite]
        if broken:
            places = {place: number for number, place in self._place.items()}
            raise CalibrationError(
                f"distilling from {self.name}",
                found=f"hidden values of the teacher that are NaN or infinite in sequence {places[broken[0]]}, and in "
                f"{len(set(broken))} of {len(places)} in all",
                do="Give another teacher; float16 ends at 65504: convert it to bfloat16",
            )


@dataclass(frozen=True)
class _Split:
    """Where a teacher's graph is cut: [0, cut) once, [cut, stop) as often as its ``logits`` are asked for."""

    cut: int
    stop: int
    logits: fx.Node

    @classmethod
    def of(cls, program: Program) -> _Split:
        """Cut between the last block and what multiplies after it, the head, where least is alive."""
        flow, logits = Flow.of(program), logits_node(program)
        assert logits is not None, "its perplexity was measured"
        sites = [site for site in find_sites(program)[0] if site.node in flow.varying]
        last = max((flow.position[site.node] for site in sites if site.block is not None), default=-1)
        stop = flow.position[logits] + 1
        after = (flow.position[site.node] for site in sites if site.block is None)
        beyond = min((at for at in after if at > last), default=stop - 1)
        return cls(smallest(alive(flow), last + 1, beyond), stop, logits)
