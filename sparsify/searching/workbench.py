"""One model on which many prunings are tried: opened once, traced once, calibrated once where that is enough.

A trial writes to tensors in memory over the source's own. What a pass records of the inputs is the same in every trial
where the forward goes on with dense weights (schedule ``dense``); where it is no more than a number for each feature it
is kept, and a trial runs no calibration then.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsify.calibration.gradients import Samples
from sparsify.calibration.measuring import measure_inputs
from sparsify.calibration.recorder import GroupRecorder
from sparsify.compiler.request import most_rows
from sparsify.context import Context, SiteResult
from sparsify.data.batches import Calibration, evaluation_windows, load_calibration
from sparsify.data.chat import Chat
from sparsify.data.sources import check_named, same_source
from sparsify.frontend.capture import capture
from sparsify.frontend.source import Source, open_source
from sparsify.host import within_memory
from sparsify.ir.program import Program
from sparsify.ir.store import MemoryStore
from sparsify.ir.weights import Weights
from sparsify.method.weight_pass import WeightPass
from sparsify.precision import exact_products
from sparsify.prune.engine import prune
from sparsify.prune.names import Wanted
from sparsify.prune.shares import shared_out
from sparsify.prune.targets import Target, choose
from sparsify.prune.turn import Turn
from sparsify.quality.heldout import with_use
from sparsify.searching.judge import Judge
from sparsify.tensors import digest
from sparsify.words import Schedule, format_bytes

# Statistics that are one number for each input feature.
_SMALL = frozenset({"squared_norm", "absolute_sum", "absolute_max", "sum"})


@dataclass(frozen=True)
class Words:
    """What a user asks of a search or a measurement of sensitivity, beside the pass; as for :func:`sparsify.compile`.

    Attributes:
        data: the text that judges. calibration: None for the rest of the same source.
        windows: judge by the first so many windows. opening: how the model is opened.
    """

    data: str
    calibration: Any = None
    windows: int | None = None
    samples: int | None = None
    sequence_length: int | None = None
    schedule: Schedule = "layer"
    only: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    chat_template: str | Path | None = None
    opening: Mapping[str, Any] = field(default_factory=dict)


class Workbench:
    """The model, the text that judges, and, once they are drawn, the calibration batches. A context manager.

    Attributes:
        targets: what the pass prunes where nothing is left out. left: why other sites stay dense.
        calibration: None for a pass that needs none. label: the text that judges.

    Raises:
        SparsifyError: as :func:`sparsify.compile` and :func:`sparsify.evaluation.evaluate.evaluate`.
    """

    def __init__(self, model: str | Path | nn.Module, own: WeightPass, words: Words, context: Context) -> None:
        self.own, self.words, self.context = own, words, context
        check_named(words.data, words.calibration)
        self.source: Source = open_source(model, **words.opening)
        self._chat = Chat(self.source, words.chat_template)
        self._drawn = words.calibration if words.calibration is not None else words.data
        self._both = isinstance(self._drawn, str) and own.needs_data and same_source(self._drawn, words.data)
        windows, label = evaluation_windows(
            words.data, self.source, words.sequence_length, words.windows, self._chat, both=self._both
        )
        self.label = (
            f"{len(windows)} windows of {windows.shape[1]} tokens of {with_use(label, words.data, self.source)}"
        )
        with within_memory(f"tracing {self.source.name}", context.device):
            self.judge = Judge(self.source, windows, context)
        self._wanted = Wanted.of(self.source.weights, words.only, words.ignore)
        # What can be refused is, before calibration is drawn.
        self.program: Program = self.judge.program
        self.targets, self.left = choose(self.program, own.pattern, self._wanted)
        self.calibration: Calibration | None = None
        self._held: dict[str, GroupRecorder] | None = None
        self._stack = ExitStack()

    def draw(self) -> None:
        """Draw the calibration batches, which is long where the model writes them itself; before any pruning.

        Raises:
            SparsifyError: as :func:`sparsify.compile`.
        """
        own, words = self.own, self.words
        if own.needs_data:
            self.calibration = load_calibration(
                self._drawn,
                self.source,
                samples=words.samples,
                sequence_length=words.sequence_length,
                seed=self.context.seed,
                rows=most_rows([own]),
                chat=self._chat,
                both=self._both,
            )
            if not _takes(self.program, self.calibration.batches[0]):
                self.program = capture(self.source, self.calibration.batches[0])
                self.targets, self.left = choose(self.program, own.pattern, self._wanted)
        self._chat.check_used("--calibration or --data")

    def judge_by(self, windows: int) -> None:
        """Judge by the first so many windows only."""
        text = self.judge.windows
        if len(text) > windows:
            self.label = self.label.replace(f"{len(text)} windows", f"{windows} windows", 1)
            self.judge = Judge(self.source, text[:windows], self.context)
            self._stack.close()
            self._stack.enter_context(self.judge)

    def __enter__(self) -> Workbench:
        self._stack.enter_context(self.judge)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def size(self, seconds: float) -> str:
        """What a trial costs, as far as is known before the first: the dense model took ``seconds`` to read."""
        dense = self.dense
        held = sum(dense.shape(t.parameter).numel() * dense.dtype(t.parameter).itemsize for t in self.targets)
        runs = "no calibration"
        if self.calibration is not None:
            once = "one for all" if self.once(self.words.schedule) else "once each"
            runs = f"a calibration run over {self.calibration.size} ({once})"
        return (
            f"a pruning, {runs}, and a reading of {len(self.judge.windows)} windows (of the dense model: {seconds:.1f} "
            f"s); up to {format_bytes(held)} of pruned weights are in memory beside the activations"
        )

    @property
    def dense(self) -> Weights:
        """The weights of the model as it was given."""
        return self.source.weights

    def once(self, schedule: Schedule) -> bool:
        """Whether one calibration serves every trial in ``schedule``."""
        return (
            self.calibration is not None
            and schedule == "dense"
            and self.own.allocation == "uniform"
            and is_light(self.own)
        )

    @exact_products()
    def prune(
        self, own: WeightPass, targets: Sequence[Target], schedule: Schedule | None = None
    ) -> tuple[Weights, list[SiteResult]]:
        """The model's weights with ``targets`` pruned by ``own``, as a compile prunes them, and what happened.

        Args:
            schedule: None for that of the workbench.
        """
        schedule = schedule or self.words.schedule
        weights = self.dense.on(MemoryStore(self.dense.store))
        program, data = self.program, self.calibration
        program.weights = weights
        if not targets:
            return weights, []
        with within_memory(f"pass {own.name}", self.context.device):
            if self.once(schedule):
                return weights, self._by_held(own, targets)
            samples = None if data is None else Samples(data.batches, data.labels)
            return weights, prune(program, own, targets, samples, self.context, schedule=schedule, dense=self.dense)

    def _by_held(self, own: WeightPass, targets: Sequence[Target]) -> list[SiteResult]:
        assert self.calibration is not None
        program, batches, context = self.program, self.calibration.batches, self.context
        if self._held is None:
            sites = [site for target in self.targets for site in target.sites]
            pruned, program.weights = program.weights, self.dense
            self._held = measure_inputs(program, sites, batches, own.statistics, context)
            program.weights = pruned
        passes, held, sequences = shared_out(own, targets), self._held, self.calibration.sequences
        return [
            Turn(program, passes[t.parameter], t, context.device, held[t.parameter], sequences).take() for t in targets
        ]

    def question(self) -> dict[str, Any]:
        """Everything that decides what a trial gives, as JSON; the model and the data by digests."""
        model = hashlib.blake2b(digest_size=32)
        for name in sorted(self.dense.parameters()):
            model.update(f"{name} {digest(self.dense.read(name))}\n".encode())
        data = self.calibration
        return {
            "model": model.hexdigest(),
            "judged": digest(self.judge.windows),
            "calibration": None if data is None else data.digest,
            "schedule": self.words.schedule,
            "only": list(self.words.only),
            "ignore": list(self.words.ignore),
            "seed": self.context.seed,
            "compute_dtype": None if self.source.compute is None else str(self.source.compute),
            "device": self.context.device.type,
        }


def _takes(program: Program, batch: Mapping[str, Tensor]) -> bool:
    """Whether ``program`` was traced with inputs as those of ``batch`` are."""
    traced = {n.meta["input"]: (tuple(n.meta["val"].shape), n.meta["val"].dtype) for n in program.inputs}
    given = {name: (tuple(value.shape), value.dtype) for name, value in batch.items() if name not in program.literals}
    return traced == given and program.unlike(batch) is None


def is_light(own: WeightPass) -> bool:
    """Whether what ``own`` wants to know of an input is no more than a few numbers for each feature."""
    return _SMALL.issuperset(own.statistics)


def zeros_of(results: Sequence[SiteResult]) -> int:
    """How many weights the pruned sites have that are zero."""
    return sum(round((1 - site.kept) * math.prod(site.shape)) for site in results)
