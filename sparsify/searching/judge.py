"""One trace of a model, by which all of its prunings are judged: perplexity, or how far predictions moved."""

from __future__ import annotations

import math
from types import TracebackType

import torch
from torch import Tensor

from sparsify.calibration.activations import ActivationStore
from sparsify.context import Context
from sparsify.frontend.capture import capture
from sparsify.frontend.source import Source
from sparsify.ir.program import Program
from sparsify.ir.weights import Weights
from sparsify.precision import exact_products
from sparsify.quality.perplexity import as_batches, predict, window_losses

# Numbers of a chunk [tokens, vocabulary] in float32; some four of them are alive at once.
_CHUNK = 1 << 22


class Judge:
    """``windows`` [count, length] of token ids, and the model traced on them. A context manager.

    Raises:
        SpecError, CalibrationError, TraceError: as :func:`sparsify.quality.perplexity.perplexity`.
    """

    def __init__(self, source: Source, windows: Tensor, context: Context) -> None:
        self.windows, self.context = windows, context
        self.batches = as_batches(windows, source)
        self.program: Program = capture(source, self.batches[0])
        self._store = ActivationStore(context.memory // 2)
        self._kept = False

    def __enter__(self) -> Judge:
        self._store.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._store.__exit__(kind, error, trace)

    @exact_products()
    def perplexity(self, weights: Weights) -> float:
        """Of the model with ``weights``; infinity where it is no number: such a model is judged, not refused."""
        self.program.weights = weights
        mean = float(window_losses(self.program, self.batches, self.context).mean())
        return math.exp(mean) if mean < math.log(1e300) else math.inf

    @exact_products()
    def keep(self, dense: Weights) -> None:
        """Keep the predictions of the dense model, for :meth:`divergence`; past the memory they go to a file."""
        self.program.weights, self._kept = dense, True
        predict(self.program, self.batches, self.context, lambda at, logits: self._store.put(at, "logits", logits))

    @exact_products()
    def divergence(self, weights: Weights) -> float:
        """KL(dense ‖ pruned) of the predictions, in nats a token; infinity where it is no number."""
        assert self._kept, "the dense model's predictions come first"
        self.program.weights = weights
        total, tokens = 0.0, 0

        def record(at: int, logits: Tensor) -> None:
            nonlocal total, tokens
            dense = self._store.take(at, "logits", logits.device, keep=True)
            assert isinstance(dense, Tensor)
            ours, theirs = logits.flatten(0, 1), dense.flatten(0, 1)
            size = max(1, _CHUNK // ours.shape[1])
            for one, other in zip(ours.split(size), theirs.split(size), strict=True):
                said, wanted = torch.log_softmax(one.float(), -1), torch.log_softmax(other.float(), -1)
                total += float((wanted.exp() * (wanted - said)).sum(dtype=torch.float64))
            tokens += len(ours)

        predict(self.program, self.batches, self.context, record)
        return total / tokens if math.isfinite(total) else math.inf
