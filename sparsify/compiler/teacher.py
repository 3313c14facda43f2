"""The dense model that a pass fits to, where it is not the one that is pruned here."""

from __future__ import annotations

from typing import Any

from sparsify.context import Context
from sparsify.errors import CheckpointError, SpecError
from sparsify.frontend.capture import Batch, capture
from sparsify.frontend.source import Source, open_source
from sparsify.ir.program import Program


def open_teacher(name: Any, pupil: Source, batch: Batch, context: Context, **opening: Any) -> Program:
    """The teacher traced on the pupil's batch.

    Args:
        name: a folder, a hub id or a module. opening: as for :func:`sparsify.frontend.source.open_source`.

    Raises:
        CheckpointError, TraceError: no such model, or none that takes the batch. SpecError: one of other tokens.
    """
    source = open_source(name, **opening)
    check_same_tokens(pupil, source)
    return capture(source, batch)


def check_same_tokens(pupil: Source, teacher: Source, *, padded: bool = False) -> None:
    """Hold the tokens of two models against each other.

    Args:
        padded: let vocabularies of other sizes pass where both have the same tokenizer: one has rows of padding.

    Raises:
        SpecError: the same text is other tokens to the two, so that neither could learn from the other.
    """
    found = None
    ours, theirs = words_of(pupil), words_of(teacher)
    if ours is not None and theirs is not None and ours != theirs:
        other = sum(ours.get(word) != number for word, number in theirs.items())
        found = f"{other} of its tokenizer's {len(theirs)} tokens have other ids in the pruned model's"
    elif padded and ours is not None and theirs is not None:
        return
    elif pupil.vocab_size and teacher.vocab_size and pupil.vocab_size != teacher.vocab_size:
        found = f"a vocabulary of {teacher.vocab_size} tokens, and {pupil.vocab_size} in the pruned model"
    if found is not None:
        raise SpecError(f"teacher {teacher.name}", found=found, do="Give the dense model that was pruned")


def words_of(source: Source) -> dict[str, int] | None:
    """The tokens of a source's tokenizer with their ids; None where it has none."""
    try:
        words: dict[str, int] = source.tokenizer().get_vocab()
    except (CheckpointError, NotImplementedError, AttributeError):  # none there, or a processor of images
        return None
    return words
