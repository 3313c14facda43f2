"""How far predictions are from a teacher's, with no more than a few tokens' probabilities in memory at once.

Per token, z the teacher's logits and ẑ the student's: KL(softmax z ‖ softmax ẑ), whose gradient by ẑ is
softmax ẑ − softmax z (1503.02531, at temperature 1: what is wanted is the teacher's distribution itself).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Numbers of a chunk [tokens, vocabulary]; some five of them in float32 are alive at once.
CHUNK = 1 << 22
# The teacher's logits for one sequence of the batch: [length, vocabulary].
Teach = Callable[[int], Tensor]


def divergence(
    logits: Tensor, teach: Teach, *, counted: Tensor | None = None, ids: Tensor | None = None, share: float = 1.0
) -> Tensor:
    """``share`` of the mean divergence over tokens, and of the next tokens' mean cross-entropy the rest: a scalar in
    float32.

    Beside ``logits`` their gradient is kept where one is wanted, in their dtype, and one sequence's logits of the
    teacher.

    Args:
        logits: the student's, [batch, length, vocabulary]. counted: [batch, length], False where a token is padding;
            None counts all. ids: [batch, length], needed where ``share`` is below 1; all of its tokens count.

    >>> student = torch.zeros(1, 2, 3, requires_grad=True)
    >>> teacher = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 100.0]])
    >>> loss = divergence(student, lambda row: teacher)
    >>> loss.backward()
    >>> round(loss.item(), 4), student.grad[0, 1].mul(6).round().tolist()  # log(3) / 2
    (0.5493, [1.0, 1.0, -2.0])
    """
    found = _Divergence.apply(logits, teach, counted, ids, share)
    assert isinstance(found, Tensor)
    return found


class _Divergence(torch.autograd.Function):
    """Derived by hand: autograd would keep both models' probabilities of all tokens, in float32."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, teach: Teach, counted: Tensor | None, ids: Tensor | None, share: float
    ) -> Tensor:
        rows, length, vocabulary = logits.shape
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        total = logits.new_zeros((), dtype=torch.float32)
        at_once = max(1, CHUNK // vocabulary)
        tokens = rows * length if counted is None else max(1, int(counted.sum()))
        by_teacher, by_text = share / tokens, (1 - share) / max(1, rows * (length - 1))
        for row in range(rows):
            taught = teach(row)
            for start in range(0, length, at_once):
                stop = min(length, start + at_once)
                ours = torch.log_softmax(logits[row, start:stop].float(), -1)
                theirs = torch.log_softmax(taught[start:stop].float(), -1)
                chances, wanted = ours.exp(), theirs.exp()
                each, slope = (wanted * (theirs - ours)).sum(-1), chances - wanted
                if counted is not None:
                    # A logit of padding may be no number.
                    each = each.masked_fill(~counted[row, start:stop], 0)
                    slope.masked_fill_(~counted[row, start:stop, None], 0)
                total += by_teacher * each.sum()
                slope *= by_teacher
                if share < 1:
                    # The last token has none behind it.
                    assert ids is not None
                    following = ids[row, start + 1 : stop + 1].unsqueeze(1)
                    total -= by_text * ours[: len(following)].gather(1, following).sum()
                    slope[: len(following)] += by_text * chances[: len(following)]
                    slope[: len(following)].scatter_add_(1, following, slope.new_full(following.shape, -by_text))
                if gradient is not None:
                    gradient[row, start:stop] = slope
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * above.to(gradient.dtype), None, None, None, None
