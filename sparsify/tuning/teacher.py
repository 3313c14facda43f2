"""The model that a run distils from: opened, held against the one that is tuned, and told apart from others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsify.calibration.loss import logits_node
from sparsify.compiler.teacher import check_same_tokens, words_of
from sparsify.context import Context
from sparsify.data.batches import example_batch
from sparsify.errors import SpecError
from sparsify.frontend.capture import capture
from sparsify.frontend.source import Source, open_source
from sparsify.ir.program import Program
from sparsify.ir.weights import Weights
from sparsify.quality.perplexity import perplexity
from sparsify.tensors import BLAKE, as_bytes, new_hash
from sparsify.tuning.masks import masks_of


def open_for(pupil: Source, name: str | Path | nn.Module, **opening: Any) -> Source:
    """The teacher ``name``, opened without reading its weights.

    Args:
        opening: as for :func:`sparsify.frontend.source.open_source`.

    Raises:
        CheckpointError: no such model. SpecError: one of other tokens.
    """
    teacher = open_source(name, **opening)
    check_same_tokens(pupil, teacher, padded=True)
    return teacher


def known(teacher: Source, pupil: str, program: Program, held_out: Tensor, context: Context) -> Mapping[str, Any]:
    """What the record says of the teacher: its name, the digest of its weights, how many of them are pruned, its
    perplexity on the held-out text [windows, length], and over how many tokens it predicts, and how many of them are
    learnt, where it has rows of padding that the pupil has not.

    Args:
        pupil: the digest of the pupil's weights. program: the pupil's.

    Raises:
        SpecError: its predictions are over other tokens than the pupil's, or it is the pupil itself.
        TraceError: no causal language model. CalibrationError: a perplexity that is no number.
    """
    traced = capture(teacher, example_batch(teacher))
    ours, theirs = _width(program), _width(traced)
    # Embeddings are padded to other widths (Qwen2.5's of 0.5B and of 7B): no text has a token of the further rows.
    words = words_of(teacher)
    wider = False
    if words and ours is not None and theirs is not None:
        wider = theirs > ours > max(words.values())
    if theirs is not None and ours != theirs and not wider:
        raise SpecError(
            f"teacher {teacher.name}",
            found=f"predictions over {theirs} tokens, and {ours} in the model that is tuned",
            do="Give the dense model that was pruned, or one with the same head",
        )
    pruned = len(masks_of(traced))
    if (own := weights_digest(teacher.weights)) == pupil:
        raise SpecError(
            f"teacher {teacher.name}",
            found=f"the very weights that are tuned{', as pruned as they are' if pruned else ''}: nothing to learn",
            do="Give the dense model that was pruned",
        )
    measured = perplexity(teacher, held_out, context)
    said = {"name": teacher.name, BLAKE: own, "perplexity": measured}
    said |= {"pruned": pruned} if pruned else {}
    return said | ({"predictions": [theirs, ours]} if wider else {})


def _width(program: Program) -> int | None:
    """How many tokens its predictions are over."""
    node = logits_node(program)
    return None if node is None else int(node.meta["val"].shape[-1])


def weights_digest(weights: Weights) -> str:
    """Of every parameter: name, dtype, shape and bytes."""
    whole = new_hash()
    for name in sorted(weights.parameters()):
        whole.update(f"{name} {weights.dtype(name)} {list(weights.shape(name))}".encode())
        whole.update(as_bytes(weights.read(name).cpu().contiguous()))
    return whole.hexdigest()
