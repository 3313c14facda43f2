"""Runs a region pass over a program: the pruned stream and the dense one side by side, block after block.

For block k, P is its input in the pruned model with blocks before k as they came out, T what the dense model's block
gives in its own stream. What is trained is judged on sequences that it was not trained on, with the weights as they
would be written; where it gained nothing there, nothing is written.

Several processes run both streams, for steps draw from all sequences in an order of their own. Of every step each
differentiates a part, which is where the time goes; gradients and losses are brought together: all decide alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict

import torch
from torch import Tensor, fx

from sparsify.analysis.flow import Flow
from sparsify.calibration.activations import ActivationStore
from sparsify.calibration.interpreter import Interpreter, Region, alive, go_on
from sparsify.calibration.loss import logits_node
from sparsify.context import Context, Progress, RegionResult
from sparsify.errors import CalibrationError, SpecError
from sparsify.host import within_memory
from sparsify.ir.program import Program
from sparsify.journal.journal import NOT_KEPT, Kept
from sparsify.journal.reached import Reached
from sparsify.method.region_pass import RegionPass
from sparsify.method.spec import spec_text
from sparsify.precision import exact_products
from sparsify.refine.fitter import Fit, Fitter, Judge, Lessons
from sparsify.refine.masters import Masters
from sparsify.refine.regions import Block, find_blocks
from sparsify.refine.trainable import Trainable, expert_tokens

# Of the best rate's gain in one epoch, what a larger rate must have gained to be taken for all epochs.
PROMISE = 0.75


@exact_products()
def refine(
    program: Program,
    own: RegionPass,
    batches: Sequence[Mapping[str, Tensor]],
    context: Context,
    teacher: Program,
    *,
    every: bool = False,
    left: frozenset[str] = frozenset(),
    done: Kept = NOT_KEPT,
    lesson: int = 1,
) -> list[RegionResult]:
    """Fit every block of ``program`` to that of ``teacher``.

    Args:
        batches: of the shapes that both were captured with.
        every: where no linear weight has zeros, train all of them: those of a model that was made smaller.
        left: checkpoint tensors that stay as they are.
        done: blocks that a run before has finished, and where those of this one are kept.
        lesson: how many batches are what one process would have as one, where several share a step.

    Raises:
        SpecError: nothing is pruned, or nothing otherwise than in the teacher.
        CalibrationError: too few sequences to hold some back, or a loss that is no number.
        TraceError: blocks that do not run one after the other, or that are not the teacher's.
    """
    return Refining(program, own, batches, context, teacher, every, left, done, lesson).run()


class Refining:
    """One run of a region pass; see :func:`refine`."""

    def __init__(
        self,
        program: Program,
        own: RegionPass,
        batches: Sequence[Mapping[str, Tensor]],
        context: Context,
        teacher: Program,
        every: bool,
        left: frozenset[str],
        done: Kept,
        lesson: int,
    ) -> None:
        self.program, self.own, self.batches, self.context, self.teacher = program, own, batches, context, teacher
        self.done = done
        self.blocks, self.taught, self.logits = fitting(program, own, teacher)
        self.lessons = lessons_of(own, batches, lesson)
        if self.logits is not None and self.logits.meta["val"].shape[-1] == 1:
            self.logits = None  # one score is no choice: it is fitted as a value
        self.trainable = Trainable(program, self.blocks, self.logits, left)
        self.every = every and self._smaller() and not self.trainable.any_pruned()
        if not self.every:
            self.trainable.check_pruned()
        if self.trainable.equal(teacher.weights):
            raise SpecError(
                "refining to the teacher's outputs",
                found="a teacher with the very weights that are refined: nothing to learn",
                do="Give the dense model that was pruned",
            )
        self.tokens = expert_tokens(program, batches, context)

    def run(self) -> list[RegionResult]:
        """Refine every block in order, and say what became of it."""
        results = []
        flow, theirs = Flow.of(self.program), Flow.of(self.teacher)
        end, taught_end = len(flow.order), len(theirs.order)
        with ExitStack() as stack, torch.no_grad():
            stores = [stack.enter_context(ActivationStore(self.context.memory // 2, self.context.device)) for _ in "PT"]
            student = Fitter(self.program, flow, self.batches, stores[0], self.context.device)
            teacher = Fitter(self.teacher, theirs, self.batches, stores[1], self.context.device)
            runners: dict[str, Interpreter] = {"student": student, "teacher": teacher}
            reached = Reached(self.done, self.context.world)
            first, values = reached.load() or (0, ())
            go_on(runners, values)

            def run(runner: Fitter, region: Region, number: int) -> None:
                # What lies before is done, and what is alive behind it is there.
                (runner.skip if number < first else runner.run_region)(region)

            run(student, Region(0, self.blocks[0].start, end), 0)
            run(teacher, Region(0, self.taught[0].start, taught_end), 0)
            for number, (block, taught) in enumerate(zip(self.blocks, self.taught, strict=True)):
                self._tell(number, block.name)
                run(teacher, Region(taught.start, taught.stop, taught_end), number)
                kept = self.trainable.kept(number, self.tokens, every=self.every)
                if any(mask is not None for mask in kept.values()):
                    if number < first and self.done.find(block.name) is None:
                        raise reached.damaged(f"it speaks of {block.name}, which is not finished")
                    with within_memory(f"refining {block.name}", self.context.device):
                        results.append(self._kept_or_fitted(number, student, teacher, kept))
                last = number + 1 == len(self.blocks)
                if not last:
                    run(student, Region(block.start, block.stop, end), number)
                teacher.forget()
                if not last and number >= first and reached.due(number + 1):
                    reached.keep(number + 1, alive(runners))
        return results

    def _smaller(self) -> bool:
        """Whether a weight has another shape than the teacher's: channels were taken out."""
        ours, theirs = self.program.weights, self.teacher.weights
        return any(n not in theirs or ours.shape(n) != theirs.shape(n) for own in self.trainable.matrices for n in own)

    def _kept_or_fitted(
        self, number: int, student: Fitter, teacher: Fitter, kept: Mapping[str, Tensor | None]
    ) -> RegionResult:
        """What a run before has made of the block, stored again; else it is fitted, and kept."""
        weights, name = self.program.weights, self.blocks[number].name
        found = self.done.find(name)
        if found is not None:
            for parameter, value in found.tensors().items():
                weights.write(parameter, value)
            student.forget()
            return found.made(RegionResult)
        result = self._block(number, student, teacher, kept)
        self.done.add(name, asdict(result), {parameter: weights.read(parameter) for parameter in result.written})
        return result

    def _block(self, number: int, student: Fitter, teacher: Fitter, kept: Mapping[str, Tensor | None]) -> RegionResult:
        started = time.perf_counter()
        block, taught = self.blocks[number], self.taught[number]
        predicts = self.logits is not None and number + 1 == len(self.blocks)
        order = student.flow.position
        if predicts:
            wanted = self.logits
            assert wanted is not None
            work = student.prepare(block.start, order[wanted] + 1, len(order), list(kept))
            judge = self._by_predictions(teacher, taught)
        else:
            wanted = block.output
            work = student.prepare(block.start, block.stop, len(order), list(kept))
            judge = self._by_values(teacher, taught)
        world = self.context.world
        fit = Fit(student, work, wanted, judge, self.own, block.name, world)
        weights, lessons = self.program.weights, self.lessons
        first = Masters.of(weights, kept, self.context.device)
        student.take(first.stored(weights))
        before = fit.loss(lessons)
        if not math.isfinite(before):
            raise CalibrationError(
                f"refining {block.name}",
                found="a loss that is NaN or infinite before the first step",
                do="Look at the weights; where float16 overflows take --compute-dtype float32",
            )
        best, chosen, rate = before, dict[str, Tensor](), None
        problems: list[CalibrationError] = []
        ladder = self.own.ladder
        # One epoch with each of several rates, then all epochs with the best of them.
        attempts = [(attempt, 1 if len(ladder) > 1 else self.own.epochs) for attempt in ladder]
        gains: dict[float, float] = {}
        while attempts:
            attempt, epochs = attempts.pop(0)
            masters = Masters.of(weights, kept, self.context.device)

            def tell(epoch: int, attempt: float = attempt) -> None:
                self._tell(number, f"{block.name}, rate {attempt:g}, epoch {epoch + 1}")

            try:
                fit.train(masters, attempt, epochs, lessons, self.context.seed + number, tell)
            except CalibrationError as error:
                problems.append(error)
            else:
                stored = masters.stored(weights)
                student.take(stored)
                after = fit.loss(lessons)
                gains[attempt] = before - after
                if after < best:
                    best, chosen, rate = after, {n: v.cpu() for n, v in stored.items()}, attempt
            if not attempts and epochs < self.own.epochs and rate is not None:
                attempts = [(promising(gains), self.own.epochs)]
        if len(problems) >= len(ladder):
            raise problems[-1]
        for name, value in chosen.items():
            # All have made the same steps; of what machines round otherwise the first one's stands.
            weights.write(name, world.given(value, 0))
        student.forget()
        entries = sum(int(weights.shape(n).numel()) if m is None else int(m.sum()) for n, m in kept.items())
        return RegionResult(
            block.name, "kl" if predicts else "error", before, best, rate, entries, sorted(chosen),
            time.perf_counter() - started,
        )  # fmt: skip

    def _by_values(self, teacher: Fitter, taught: Block) -> Judge:
        def judge(index: int, value: Tensor) -> Tensor:
            target = teacher.store.take(index, taught.output.name, self.context.device, keep=True)
            assert isinstance(target, Tensor)
            return self.own.error(value, target, self._counted(index, value))

        return judge

    def _by_predictions(self, teacher: Fitter, taught: Block) -> Judge:
        """The dense model's logits are made again of its last hidden values whenever they are needed: kept, they would
        take as much as the vocabulary is wide."""
        logits = logits_node(self.teacher)
        assert logits is not None
        order = teacher.flow.position
        work = teacher.prepare(taught.stop, order[logits] + 1, len(order))

        def judge(index: int, value: Tensor) -> Tensor:
            with torch.no_grad():
                target = teacher.give(work, index, logits)
            return self.own.divergence(value, target, self._counted(index, value))

        return judge

    def _counted(self, index: int, value: Tensor) -> Tensor | None:
        """Where there are tokens, and no padding."""
        mask = self.batches[index].get("attention_mask")
        if mask is None or mask.dim() != 2 or tuple(value.shape[:-1]) != tuple(mask.shape) or bool((mask != 0).all()):
            return None
        return (mask != 0).to(value.device)

    def _tell(self, number: int, what: str) -> None:
        self.context.world.says(f"refining {what}")
        self.context.observe(Progress("refining", number, len(self.blocks), what, "block"))


def fitting(program: Program, own: RegionPass, teacher: Program) -> tuple[list[Block], list[Block], fx.Node | None]:
    """The blocks of both models, and the predictions of the first where its last block is fitted to predictions.

    Raises:
        SpecError, TraceError: they are not one model, or no blocks that run one after the other.
    """
    blocks, taught = find_blocks(program), find_blocks(teacher)
    check_alike(blocks, taught)
    logits = logits_node(program) if own.last == "kl" else None
    theirs = logits_node(teacher)
    if logits is not None and (theirs is None or theirs.meta["val"].shape != logits.meta["val"].shape):
        raise _other("predictions", logits, theirs)
    return blocks, taught, logits


def lessons_of(own: RegionPass, batches: Sequence[Mapping[str, Tensor]], size: int = 1) -> Lessons:
    """Which lessons are trained on, and which are held back.

    Args:
        size: batches of a lesson.

    Raises:
        CalibrationError: none of either.
    """
    count = -(-len(batches) // size)
    sequences = sum(len(next(iter(batch.values()))) for batch in batches)
    # Whole batches: where they are few, one of them is more than was asked for.
    held = max(1, round(own.guard * count))
    if round(own.guard * sequences) < 1 or held >= count:
        raise CalibrationError(
            f"{spec_text(own)} on {sequences} sequences in {count} batches",
            found="none to hold back" if held < count else "none to train on beside those that are held back",
            do="Give more --samples, a smaller batch=, or another guard",
        )
    # Spread over the text, which may be of several kinds in a row.
    chosen = {int((i + 0.5) * count / held) for i in range(held)}
    return Lessons([i for i in range(count) if i not in chosen], sorted(chosen), size, len(batches))


def promising(gains: Mapping[float, float]) -> float:
    """The rate to go on with, of what each gained in one epoch: the largest that gained almost as much as the best.

    A rate that is too large for one epoch is right for several, whose last ones take smaller steps.
    """
    least = PROMISE * max(gains.values())
    return max(rate for rate, gain in gains.items() if gain >= least)


def check_alike(blocks: Sequence[Block], taught: Sequence[Block]) -> None:
    """Raises:
    SpecError: two models whose blocks do not give values of one shape.
    """
    if len(blocks) != len(taught):
        raise SpecError(
            "refining to the teacher's outputs",
            found=f"{len(blocks)} blocks, and {len(taught)} in the teacher",
            do="Give the dense model that was pruned; where blocks were taken out (granularity=layer), train with "
            "sparsify tune --teacher",
        )
    for ours, theirs in zip(blocks, taught, strict=True):
        if ours.output.meta["val"].shape != theirs.output.meta["val"].shape:
            raise _other(f"the output of {ours.name}", ours.output, theirs.output)


def _other(what: str, ours: fx.Node, theirs: fx.Node | None) -> SpecError:
    other = "none" if theirs is None else str(list(theirs.meta["val"].shape))
    return SpecError(
        "refining to the teacher's outputs",
        found=f"{what} of shape {list(ours.meta['val'].shape)}, and {other} in the teacher",
        do="Give the dense model that was pruned",
    )
