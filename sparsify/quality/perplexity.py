"""Perplexity by the papers' protocol (algorithms.md, section 1.6), streamed region by region.

The text is tokenised once and cut into disjoint windows; of each window the mean cross-entropy of its L - 1 predictions
is taken, and perplexity is exp of the mean over windows. Memory follows the largest block, as in pruning.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify.analysis.flow import Flow
from sparsify.analysis.linear import block_starts
from sparsify.calibration.activations import ActivationStore
from sparsify.calibration.interpreter import Interpreter, Region
from sparsify.calibration.loss import is_causal, logits_node, model_kind
from sparsify.context import Context, Progress
from sparsify.data.inputs import as_inputs, check_table, one_row_alone, outside, warn_of_length
from sparsify.errors import CalibrationError, TraceError
from sparsify.frontend.capture import capture
from sparsify.frontend.source import Source
from sparsify.host import within_memory
from sparsify.ir.program import Program
from sparsify.precision import exact_products
from sparsify.world.world import ALONE, World

# Logits of a window are wide: few windows at a time.
_TOKENS_AT_ONCE = 1024
# The largest mean loss whose exponential is a number.
_MOST = 700.0


def perplexity(source: Source, windows: Tensor, context: Context | None = None) -> float:
    """Perplexity on ``windows`` [count, length] of token ids, of any whole type.

    Raises:
        SpecError: windows longer than the model's table of positions.
        CalibrationError: ids of another vocabulary, too little memory, or a loss that is no number.
        TraceError: no causal language model.
    """
    losses, dtype = losses_on(source, windows, context or Context())
    return of_losses(losses, source.name, dtype)


@exact_products()
def losses_on(source: Source, windows: Tensor, context: Context) -> tuple[Tensor, torch.dtype]:
    """The mean loss of each window, float64, and the dtype that the model computed its logits in.

    Raises:
        SpecError, CalibrationError, TraceError: as :func:`perplexity`, but for losses that are no numbers.
    """
    batches = as_batches(windows, source, context.world)
    with within_memory(f"evaluating {source.name}", context.device):
        program = capture(source, batches[0])
        losses = window_losses(program, batches, context)
    return losses, check_causal(program).meta["val"].dtype


def as_batches(windows: Tensor, source: Source, world: World = ALONE) -> Windows:
    """``windows`` [count, length] a few at a time, all batches of one size, however many processes share them.

    Raises:
        SpecError: windows longer than the model's table of positions. CalibrationError: ids of another vocabulary.
        ProcessError: fewer batches than processes.
    """
    count, length = windows.shape
    vocabulary = source.vocab_size
    if vocabulary and int(windows.max()) >= vocabulary:
        raise outside(int(windows.max()), "the data", source)
    check_table(length, source)
    warn_of_length(length, source)
    most = 1 if one_row_alone(source) else max(1, _TOKENS_AT_ONCE // length)
    batches = Windows(windows, max(d for d in range(1, min(most, count) + 1) if count % d == 0), source)
    _shared(batches, world)
    return batches


def _shared(batches: Sequence[Mapping[str, Tensor]], world: World) -> Sequence[Mapping[str, Tensor]]:
    """This process's part of ``batches``."""
    return world.share(batches, f"batches of {len(batches[0]['input_ids'])} windows", "windows")


def of_losses(losses: Tensor, name: str, dtype: torch.dtype, *, refuse: bool = True) -> float:
    """Perplexity of the model ``name``, computed in ``dtype``, from the mean loss of each window, [windows].

    Args:
        refuse: what is no perplexity; else infinity stands for it.

    Raises:
        CalibrationError: a window whose loss is no number, or losses past any perplexity.
    """
    mean = float(losses.double().mean())
    if mean < _MOST:
        return math.exp(mean)
    if not refuse:
        return math.inf
    broken = (~losses.isfinite()).nonzero().flatten().tolist()
    if not broken:
        raise CalibrationError(
            f"perplexity of {name}",
            found=f"a mean loss of {mean:.0f}, whose exponential no number holds",
            do="This model predicts nothing: look at its weights",
        )
    do = "Look at its weights: without --allow-nan what they hold is finite, and what they compute is not"
    if dtype == torch.float16:
        do = "float16 ends at 65504: take --compute-dtype float32 or bfloat16; for tune convert the model"
    raise CalibrationError(
        f"perplexity of {name}",
        found=f"logits that are NaN or infinite in window {broken[0]}, and in {len(broken)} of {len(losses)} in all",
        do=do,
    )


class Windows(Sequence[Mapping[str, Tensor]]):
    """``size`` windows at a time as inputs; the ids of a large text take half the memory as they are."""

    def __init__(self, windows: Tensor, size: int, source: Source) -> None:
        self.windows, self.size, self.source = windows, size, source

    def __len__(self) -> int:
        return len(self.windows) // self.size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            start, stop, _ = index.indices(len(self))
            return Windows(self.windows[start * self.size : stop * self.size], self.size, self.source)
        at = range(len(self))[index] * self.size
        return as_inputs(self.windows[at : at + self.size].long(), self.source)


def window_losses(program: Program, batches: Sequence[Mapping[str, Tensor]], context: Context) -> Tensor:
    """The mean loss of each window, float64: of all windows, though several processes share them."""
    losses: list[Tensor] = []
    own = _shared(batches, context.world)

    def record(index: int, logits: Tensor) -> None:
        ids = own[index]["input_ids"].to(logits.device, non_blocking=True)
        flat = nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        losses.append(flat.view(len(ids), -1).mean(dim=1).double())

    predict(program, own, context, record)
    return torch.cat(context.world.gathered(torch.cat(losses).cpu()))


def predict(
    program: Program,
    batches: Sequence[Mapping[str, Tensor]],
    context: Context,
    record: Callable[[int, Tensor], None],
) -> None:
    """Run ``program`` region by region; ``record`` is given the number of each batch and its logits."""
    logits = check_causal(program)
    flow = Flow.of(program)
    stop = flow.position[logits] + 1
    cuts = itertools.pairwise([0, *block_starts(program, flow), stop])
    regions = [Region(start, end, stop) for start, end in cuts]
    # All batches are of one shape.
    windows, length = len(batches) * len(batches[0]["input_ids"]), batches[0]["input_ids"].shape[1]

    def on_value(index: int, node: fx.Node, values: Mapping[fx.Node, Any]) -> None:
        record(index, values[node])

    with ActivationStore(context.memory, context.device) as store, torch.no_grad():
        runner = Interpreter(program, flow, batches, store, context.device)
        for number, region in enumerate(regions):
            finished = itertools.count(1)

            def tell(number: int = number, finished: Iterator[int] = finished) -> None:
                done = number + next(finished) / len(batches)
                context.world.says(f"evaluating {windows} windows")
                told = Progress("evaluating", done, len(regions), f"{windows} windows", "layer", windows * length)
                context.observe(told)

            watch = {logits} if region.stop == stop else ()
            runner.run_region(region, watch=watch, on_value=on_value, after_batch=tell)


def check_causal(program: Program) -> fx.Node:
    """The logits of a causal language model.

    Raises:
        TraceError: it is none.
    """
    node = logits_node(program)
    if node is not None and is_causal(program):
        return node
    raise TraceError(
        f"perplexity of {model_kind(program)}",
        found="not a causal language model with logits",
        do="Perplexity is defined for models that predict the next token; evaluate this one with its own task",
    )
