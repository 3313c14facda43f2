"""One weight's turn: read it, prune each of its matrices, check the promise, store it, and say what happened."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from sparsify.calibration.recorder import GroupRecorder
from sparsify.context import Context, Progress, SiteResult
from sparsify.errors import CalibrationError, SparsifyError
from sparsify.ir.program import Program
from sparsify.journal.journal import NOT_KEPT, Kept
from sparsify.journal.record import Entry
from sparsify.method.statistics import InputStatistics
from sparsify.method.weight_pass import MatrixPass, Pruned
from sparsify.prune.parts import Part
from sparsify.prune.targets import Target
from sparsify.prune.verify import verify_pruned
from sparsify.tensors import all_finite
from sparsify.world.world import ALONE, World


def prune_without_data(
    program: Program,
    passes: Mapping[str, MatrixPass],
    targets: Sequence[Target],
    context: Context,
    kept: Kept = NOT_KEPT,
) -> list[SiteResult]:
    """Prune every target by the pass of its parameter and its weights alone; nothing is run.

    Args:
        kept: targets that a run before has finished, and where those of this one are kept.
    """
    results: list[SiteResult] = []
    world = context.world
    for start in range(0, len(targets), world.size):
        # Where nothing runs, nothing is gained on another device.
        turns = [
            Turn(program, passes[target.parameter], target, torch.device("cpu"), world=world)
            for target in targets[start : start + world.size]
        ]
        for result in taken(turns, kept):
            results.append(result)
            context.observe(Progress("pruning", len(results), len(targets), result.name, site=result))
    return results


def taken(turns: Sequence[Turn], kept: Kept) -> Iterator[SiteResult]:
    """The result of each turn in their order. Several processes do each their part of all of them first, those that
    cannot be divided dealt out, and then bring them together.
    """
    for number, turn in enumerate(turns):
        if turn.world.divided and kept.find(turn.target.parameter) is None:
            turn.begin(number % turn.world.size)
    for turn in turns:
        yield turn.kept_or_taken(kept)


class Turn:
    """One parameter: :meth:`take` prunes it; ``before`` and ``after`` are then its values, in its own layout.

    Args:
        recorder: what was recorded of the input; None without data.
        sequences: calibration sequences.
        own: statistics of the weight itself by name, [experts, out_features, in_features].
        world: the processes that share it; each takes its turn in the same order.
    """

    def __init__(
        self,
        program: Program,
        weight_pass: MatrixPass,
        target: Target,
        device: torch.device,
        recorder: GroupRecorder | None = None,
        sequences: int = 0,
        own: Mapping[str, Tensor] | None = None,
        world: World = ALONE,
    ) -> None:
        self.weights, self.method, self.target, self.site = program.weights, weight_pass, target, target.site
        self.device, self.recorder, self.sequences, self.own = device, recorder, sequences, own or {}
        self.before = self.after = torch.empty(0)
        self.biases: Tensor | None = None
        self.world = world
        self._part: Part | None = None
        self._seconds = 0.0

    def begin(self, owner: int = 0) -> None:
        """Prune this process's part of the parameter: its experts, its output neurons, or, of what cannot be divided,
        all where it is the ``owner``.

        Raises:
            As :meth:`take`.
        """
        started = time.perf_counter()
        self._read()
        dense = self.site.matrices(self.before)
        part = Part.of(
            self.world, self.site.experts, self.site.shape[0], self.method.by_rows and not self.unseen, owner
        )
        # A matrix that is pruned alone and whole is taken as the pass gives it.
        alone = self.site.experts == 1 and part.how == "whole"
        matrices, biases, notes = dense if alone else dense.clone(), self.biases, list[str]()
        # Each result is given back before the next comes: a stack of experts is large.
        for expert in part.experts:
            pruned = self._prune(expert, dense[expert, part.rows], expert in self.unseen, part.rows)
            if alone:
                matrices = pruned.weight.to(dense.dtype).unsqueeze(0)
            else:
                matrices[expert, part.rows] = pruned.weight.to(dense.dtype)
            if pruned.bias is not None and biases is not None:
                biases = biases.clone() if biases is self.biases else biases
                biases[expert, part.rows] = pruned.bias.to(biases.dtype)
            notes += [f"expert {expert}: {note}" if self.site.experts > 1 else note for note in pruned.notes]
        self._part = dataclasses.replace(part, matrices=matrices, biases=biases, notes=notes)
        self._seconds = time.perf_counter() - started

    def take(self) -> SiteResult:
        """Prune the parameter, verify it, store it, and say what happened.

        Raises:
            CalibrationError: it holds NaN or infinity, or no calibration token reaches it.
            VerifyError: the pass broke its promise. SparsifyError: what the pass itself refuses, the site named.
        """
        if self._part is None:
            self.begin()
        started = time.perf_counter()
        assert self._part is not None
        site, dense = self.site, self.site.matrices(self.before)
        matrices, biases, notes = self._part.together(self.world, dense, self.biases)
        self._part = None
        moved = None if self.method.keeps_weights else matrices
        self._check_stored(site.name, moved, None if biases is self.biases else biases)
        written = [self.target.parameter]
        if biases is not self.biases and self._store_biases(biases):
            written.append(str(site.bias))
        self._store(matrices)
        kept = site.matrices(self.after)
        return SiteResult(
            name=site.name,
            kind=site.kind,
            parameter=self.target.parameter,
            shape=tuple(self.before.shape),
            pattern=str(self.method.pattern),
            kept=float((kept != 0).sum()) / kept.numel(),
            error=self._error(dense, kept),
            seconds=self._seconds + time.perf_counter() - started,
            tokens=sum(self.tokens),
            sources=sorted(self.target.sources or self.weights.sources(self.target.parameter)),
            without_data=self.unseen,
            notes=notes,
            written=written,
        )

    def _error(self, dense: Tensor, kept: Tensor) -> float | None:
        recorder = self.recorder
        return None if recorder is None else recorder.sketch.relative_error(dense, kept, self.site.name, self.world)

    def kept_or_taken(self, kept: Kept) -> SiteResult:
        """What a run before has made of the parameter, stored again; else :meth:`take`, and it is kept."""
        found = kept.find(self.target.parameter)
        if found is not None:
            return self._restore(found)
        result = self.take()
        others = {name: self.weights.read(name) for name in result.written if name != self.target.parameter}
        made = {self.target.parameter: self.after, **others}
        kept.add(self.target.parameter, dataclasses.asdict(result), made)
        return result

    def _restore(self, found: Entry) -> SiteResult:
        self.before = self.weights.read(self.target.parameter).to(self.device)
        for name, value in found.tensors().items():
            own = name == self.target.parameter
            some = set(self.target.sources) if own and self.target.sources is not None else None
            self.weights.write(name, value, some)
            self.after = value.to(self.device) if own else self.after
        return found.made(SiteResult, shape=tuple(self.before.shape))

    def _read(self) -> None:
        self.before = self.weights.read(self.target.parameter).to(self.device)
        if not all_finite(self.before):
            raise CalibrationError(
                f"weight {self.target.parameter}",
                found="it holds NaN or infinity",
                do="Mend the checkpoint before pruning it, or leave this weight out with --ignore",
            )
        if self.site.bias is not None:
            # [experts, out_features]: every matrix has its own part of it.
            self.biases = self.site.biases(self.weights.read(self.site.bias).to(self.device))
        self.tokens = [0] * self.site.experts if self.recorder is None else self.recorder.tokens
        self.unseen = self._unseen(self.tokens)

    def _check_stored(self, name: str, *moved: Tensor | None) -> None:
        """What a pass moved was finite in float32: it may not be in the dtype that it is stored in."""
        for values in moved:
            if values is not None and not all_finite(values):
                raise CalibrationError(
                    f"{self.method.name} on {name}",
                    found=f"values past what {values.dtype} holds, in which they are stored",
                    do="Take a pass that leaves kept weights where they are (wanda), or convert the model to bfloat16",
                )

    def _unseen(self, tokens: Sequence[int]) -> list[int]:
        """Experts that no calibration token reached, where the method needs some."""
        unseen = [expert for expert, count in enumerate(tokens) if self.method.statistics and count == 0]
        if unseen and self.site.expert_axis is None:
            raise CalibrationError(
                f"the input of {self.site.name}",
                found="no calibration token reaches it",
                do="Use other calibration data, or leave it out with --ignore",
            )
        return unseen

    def _prune(self, expert: int, weight: Tensor, unseen: bool, rows: slice) -> Pruned:
        """The result of the pass on one matrix [out_features, in_features], or on those ``rows`` of it, verified."""
        method = self.method.without_data() if unseen else self.method
        try:
            pruned = method.prune(weight, self._statistics(expert, rows))
        except SparsifyError as error:
            raise error.asking(f"{error.asked} of {self.site.name}") from error
        verify_pruned(self.site.name, method, weight, pruned)
        return pruned

    def _statistics(self, expert: int, rows: slice) -> InputStatistics:
        recorder = self.recorder
        found = InputStatistics({}, 0, 0) if recorder is None else recorder.statistics(expert, self.sequences)
        # The rows were finite: their sums of squares went past what float32 holds.
        if (over := next((n for n, v in found.values.items() if not all_finite(v)), None)) is not None:
            raise CalibrationError(
                f"the input of {self.site.name}",
                found=f"values so large that their {over} overflows",
                do="Look at the weights before this site: activations past 1e18 are no language model's",
            )
        values = {name: value[expert, rows] for name, value in self.own.items()}
        if recorder is not None and self.site.parameter in recorder.outputs:
            values |= recorder.outputs[self.site.parameter].values(expert)
        bias = None if self.biases is None else self.biases[expert, rows]
        # ``derived`` stays the same object: what one site derives from the input, its siblings find.
        return dataclasses.replace(found, values={**found.values, **values}, bias=bias)

    def _store(self, matrices: Tensor) -> None:
        some = None if self.target.sources is None else set(self.target.sources)
        self.after = self.site.layout(matrices, self.before)
        self.weights.write(self.target.parameter, self.after.cpu(), some)
        if some is not None:
            # Only some checkpoint tensors of the stack were changed; what counts is what is there now.
            self.after = self.weights.read(self.target.parameter).to(self.device)

    def _store_biases(self, biases: Tensor | None) -> bool:
        """Write the whole bias once; False where only some of the stack's tensors may change."""
        if biases is None or self.site.bias is None or self.target.sources is not None:
            return False
        shape = self.weights.shape(self.site.bias)
        self.weights.write(self.site.bias, biases.reshape(shape).cpu(), None)
        return True
