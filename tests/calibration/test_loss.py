"""What gradients are taken of, by the kind of model; those without a loss are refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from support.kinds import batch, build
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from sparsify.calibration.loss import check_loss, loss
from sparsify.errors import TraceError
from sparsify.frontend.capture import capture
from sparsify.frontend.source import open_source
from sparsify.ir.program import Program

LABELS = torch.tensor([[5, 9, -100, 7, 8, 3, 4, 5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def traced() -> Callable[[str], Program]:
    return cache(lambda kind: capture(open_source(build(kind)), batch(kind, rows=1)))


def logits_of(program: Program) -> Tensor:
    shape = check_loss(program, labelled=True).meta["val"].shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_a_decoder_predicts_its_own_next_token(traced: Callable[[str], Program]) -> None:
    program, given = traced("whisper"), batch("whisper", rows=1)
    check_loss(program, labelled=False)
    logits, ids = logits_of(program), given["decoder_input_ids"]
    assert torch.equal(loss(program, logits, given, None), cross_entropy(logits[0, :-1], ids[0, 1:]))
    # Labels of a decoder are of the position where they stand, those of a language model of the one before.
    assert torch.equal(loss(program, logits, given, LABELS), cross_entropy(logits[0], LABELS[0]))
    program, given = traced("llava"), batch("llava", rows=1)
    logits = logits_of(program)
    assert torch.equal(loss(program, logits, given, LABELS), cross_entropy(logits[0, :-1], LABELS[0, 1:]))


def test_classifiers_choose_and_rewards_need_labels(traced: Callable[[str], Program]) -> None:
    tagger, given = traced("tagger"), batch("tagger", rows=1)
    logits, mask = logits_of(tagger), torch.ones(1, 12, dtype=torch.long)
    mask[0, 8:] = 0
    chosen = logits.argmax(-1)[0]
    assert torch.equal(loss(tagger, logits, given, None), cross_entropy(logits[0], chosen))
    found = loss(tagger, logits, given | {"attention_mask": mask}, None)
    assert torch.equal(found, cross_entropy(logits[0, :8], chosen[:8]))
    reward, given = traced("reward"), batch("reward", rows=1)
    with pytest.raises(TraceError, match="one score and no classes"):
        check_loss(reward, labelled=False)
    logits = logits_of(reward)
    assert torch.equal(loss(reward, logits, given, torch.tensor([0.5])), mse_loss(logits[:, 0], torch.tensor([0.5])))


@pytest.mark.parametrize(("kind", "why"), [("clip", "no logits"), ("wav2vec2", "needs labels")])
def test_what_has_no_loss_is_refused(kind: str, why: str, traced: Callable[[str], Program]) -> None:
    with pytest.raises(TraceError, match=why):
        check_loss(traced(kind), labelled=False)
