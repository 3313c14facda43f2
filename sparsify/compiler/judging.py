"""What passes did to a model, judged on text that did not calibrate them: before the work, and after it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from sparsify.compiler.request import Request
from sparsify.compiler.result import Compiled
from sparsify.context import Context
from sparsify.data.chat import Chat
from sparsify.frontend.source import Source
from sparsify.ir.program import Program
from sparsify.quality.evaluation import Evaluation, Judged, measure
from sparsify.quality.heldout import windows_of
from sparsify.quality.perplexity import as_batches, check_causal
from sparsify.tensors import digest


@dataclass(frozen=True)
class Judge:
    """Windows [count, length] of token ids, where they are from, and what is said of a model that is worse.

    Attributes:
        base: what the perplexity before is called. used: whether a chat template rendered the text.
    """

    windows: Tensor
    label: str
    context: Context
    base: str
    do: str
    used: bool

    @property
    def size(self) -> str:
        """On what, in words."""
        return f"{len(self.windows)} windows of {self.windows.shape[1]} tokens of {self.label}"

    @property
    def digest(self) -> str:
        """Of the windows."""
        return digest(self.windows)

    def before(self, source: Source) -> Evaluation:
        """The model as it was given.

        Raises:
            SpecError, CalibrationError: windows that it cannot take, or a perplexity that is no number.
        """
        return measure(source, self.windows, self.label, self.context)

    def after(self, compiled: Compiled, dense: Evaluation) -> Judged:
        """The same windows with the weights as the passes left them, which a backend is about to write."""
        source = replace(compiled.source, weights=compiled.program.weights)
        pruned = measure(source, self.windows, self.label, self.context, refuse=False)
        return Judged(dense, pruned, self.base, self.do)


def open_judge(source: Source, program: Program, request: Request, context: Context) -> Judge | None:
    """The text that judges, read now: what is wrong with it is told before the work. None where none was asked for.

    Raises:
        TraceError: no causal language model. CalibrationError: text that is missing or too short.
        SpecError: a length that the model has no positions for; a chat template that nothing needs.
    """
    if request.evaluate is None:
        return None
    check_causal(program)
    chat = Chat(source, request.template)
    # Token ids have their own length; the request's is that of calibration as well.
    length = None if isinstance(request.evaluate, Tensor) else request.length
    windows, label = windows_of(request.evaluate, source, request.eval_windows, length, chat, both=request.shares_data)
    as_batches(windows, source, context.world)  # refuses ids and lengths that the model has not
    if not (request.needs_data and request.is_named):
        chat.check_used(f"'{request.evaluate}'" if isinstance(request.evaluate, str) else label)
    pruned = bool(source.ledger.manifest.get("passes") or source.ledger.manifest.get("structure"))
    base = "the perplexity before" if pruned else "the dense perplexity"
    return Judge(windows, label, context, base, _next(request), chat.used)


def _next(request: Request) -> str:
    """What there still is to do where a model is clearly worse."""
    kinds, names = {own.kind for own in request.passes}, {own.name for own in request.passes}
    steps = []
    if "weights" in kinds and "twin" not in names:
        steps.append("try --pass twin, which fits what is kept to the dense outputs")
    if "regions" not in kinds and kinds != {"rounding"}:
        steps.append("add --pass refine, which trains each block to them")
    if "structure" in kinds or "regions" in kinds:
        steps.append("recover with sparsify tune")
    if "rounding" in kinds:
        steps.append("round to more bits, or with a smaller group")
    if "weights" in kinds:
        steps.append("sparsify sensitivity says which layers to leave dense")
    return "; ".join(steps)
