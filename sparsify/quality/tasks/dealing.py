"""Questions dealt out among processes, in the batches that one process would make of them: what a model says of a
question depends, in its last digits, on those beside it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

from sparsify.world.world import World

Answer = TypeVar("Answer")
# Numbers of questions that are answered together.
Batch = Sequence[int]


def batches_of_likelihoods(requests: Sequence[Any], size: int, *, grouped: bool) -> list[Batch]:
    """Batches of (what, context, continuation), ids of tokens, as lm-eval makes them: the longest first.

    Args:
        grouped: those that are the same but for their last token are one question.
    """
    groups: dict[Hashable, list[int]] = {}
    for number, (_, context, text) in enumerate(requests):
        groups.setdefault((*context, *text[:-1]) if grouped else number, []).append(number)

    def order(group: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        _, context, text = requests[max(group, key=lambda number: len(requests[number][2]))]
        return -len(context) - len(text), (*context, *text)

    return _batches(sorted(groups.values(), key=order), size)


def batches_of_texts(requests: Sequence[Any], size: int, length: Callable[[str], int]) -> list[Batch]:
    """Batches of (context, how it is to be gone on with), as lm-eval makes them: of one way, the longest first.

    Args:
        length: of a text in tokens.
    """
    ways: dict[str, list[int]] = {}
    for number, (_, way) in enumerate(requests):
        ways.setdefault(repr(sorted(way.items())), []).append(number)
    found: list[Batch] = []
    for numbers in ways.values():
        order = sorted(numbers, key=lambda number: (-length(requests[number][0]), requests[number][0]))
        found += _batches([[number] for number in order], size)
    return found


def dealt(
    world: World, batches: Sequence[Batch], requests: Sequence[Any], answer: Callable[[list[Any]], Sequence[Answer]]
) -> list[Answer]:
    """What ``answer`` says of each of ``requests``: each process asks it for its share of ``batches``, and all are
    given all answers.

    Args:
        answer: makes the same batches of what it is given; what it says goes through JSON.
    """
    world.says(f"answering {len(requests)} questions")
    own = sorted(number for batch in batches[world.rank :: world.size] for number in batch)
    found = list(answer([requests[number] for number in own])) if own else []
    said = [pair for each in world.told(list(zip(own, found, strict=True))) for pair in each]
    return [given for _, given in sorted(said, key=lambda pair: int(pair[0]))]


def _batches(groups: Sequence[Sequence[int]], size: int) -> list[Batch]:
    return [[n for group in groups[at : at + size] for n in group] for at in range(0, len(groups), size)]
