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


def divergence(logits: Tensor, ids: Tensor, teach: Teach, share: float = 1.0) -> Tensor:
    """``share`` of the mean divergence over all tokens, and of the next tokens' mean cross-entropy the rest: a scalar
    in float32.

    Beside ``logits`` their gradient is kept, in their dtype, and one sequence's logits of the teacher.

    Args:
        logits: the student's, [batch, length, vocabulary]. ids: [batch, length].

    >>> student = torch.zeros(1, 2, 3, requires_grad=True)
    >>> teacher = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 100.0]])
    >>> loss = divergence(student, torch.tensor([[0, 1]]), lambda row: teacher)
    >>> loss.backward()
    >>> round(loss.item(), 4), student.grad[0, 1].mul(6).round().tolist()  # log(3) / 2
    (0.5493, [1.0, 1.0, -2.0])
    """
    found = _Divergence.apply(logits, ids, teach, share)
    assert isinstance(found, Tensor)
    return found


class _Divergence(torch.autograd.Function):
    """Derived by hand: autograd would keep both models' probabilities of all tokens, in float32."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, teach: Teach, share: float) -> Tensor:
        rows, length, vocabulary = logits.shape
        gradient = torch.empty_like(logits)
        total = logits.new_zeros((), dtype=torch.float32)
        at_once = max(1, CHUNK // vocabulary)
        by_teacher, by_text = share / (rows * length), (1 - share) / max(1, rows * (length - 1))
        for row in range(rows):
            taught = teach(row)
            for start in range(0, length, at_once):
                stop = min(length, start + at_once)
                ours = torch.log_softmax(logits[row, start:stop].float(), -1)
                theirs = torch.log_softmax(taught[start:stop].float(), -1)
                chances, wanted = ours.exp(), theirs.exp()
                total += by_teacher * (wanted * (theirs - ours)).sum()
                slope = by_teacher * (chances - wanted)
                if share < 1:
                    # The last token has none behind it.
                    following = ids[row, start + 1 : stop + 1].unsqueeze(1)
                    total -= by_text * ours[: len(following)].gather(1, following).sum()
                    slope[: len(following)] += by_text * chances[: len(following)]
                    slope[: len(following)].scatter_add_(1, following, slope.new_full(following.shape, -by_text))
                gradient[row, start:stop] = slope
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * above.to(gradient.dtype), None, None, None
