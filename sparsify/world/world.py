"""Which part of a job is this process's, and what it and the others bring together. One process is all there is unless
somebody joins others (:func:`sparsify.world.joining.join`); what asks a world then finds that nothing need be done.

Shares are consecutive: the first process has the first batches, so that what is summed in the order of the processes is
summed in the order of the batches.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from sparsify.errors import ProcessError

if TYPE_CHECKING:
    from torch import Tensor, device

Item = TypeVar("Item")


class World:
    """This process alone.

    Attributes:
        rank: which process this is, of ``size``. sent: bytes that it has sent to others. waited: seconds for them;
            began: when it joined them, by the clock of :func:`time.perf_counter`. device: its GPU, or the CPU; None of
            one that is alone, which may take any.
    """

    rank: int = 0
    size: int = 1
    device: device | None = None

    def __init__(self) -> None:
        self.sent, self.waited, self.began = 0, 0.0, time.perf_counter()

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and that tells people."""
        return self.rank == 0

    @property
    def divided(self) -> bool:
        return self.size > 1

    def bounds(self, count: int, rank: int | None = None) -> tuple[int, int]:
        """Which of ``count`` things are those of process ``rank``, this one's where None: [start, stop)."""
        rank = self.rank if rank is None else rank
        return rank * count // self.size, (rank + 1) * count // self.size

    def share(self, items: Sequence[Item], what: str, more: str = "--samples") -> Sequence[Item]:
        """This process's part of ``items``.

        Args:
            what: what they are called. more: what a user gives to have more of them.

        Raises:
            ProcessError: there are fewer than processes.
        """
        if len(items) < self.size:
            fewer = f"{len(items)} or fewer" if len(items) > 1 else "one process"
            raise ProcessError(
                f"{self.size} processes",
                found=f"{what} to share out among them: {len(items)}",
                do=f"Take {fewer}, or more {more}",
            )
        start, stop = self.bounds(len(items))
        return items[start:stop]

    def summed(self, values: Tensor) -> Tensor:
        """The sum of what each process brings, floats of one shape; how many they are rounds it otherwise."""
        return values

    def summed_by(self, values: Tensor, owner: int) -> Tensor:
        """As :meth:`summed` where this process is the ``owner``; the others are given nothing that means anything."""
        return values

    def owner(self, count: int, number: int) -> int:
        """Whose thing ``number`` of ``count`` is, as :meth:`bounds` shares them out."""
        return next(rank for rank in range(self.size) if number < self.bounds(count, rank)[1])

    def greatest(self, values: Tensor) -> Tensor:
        """The largest, number by number, of what each process brings."""
        return values

    def share_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Give each of ``parameters`` the sum of the gradients that all processes found for it."""

    def gathered(self, part: Tensor) -> list[Tensor]:
        """What each process brings, which differs in its first dimension at most, in their order."""
        return [part]

    def given(self, values: Tensor, owner: int) -> Tensor:
        """What process ``owner`` brings; ``values`` of the others has its shape and dtype, and is written to."""
        return values

    def line_up(self) -> None:
        """Know the process before this one and the one after it, in a ring; once, before anything is handed on."""

    def hand_on(self, values: Tensor) -> None:
        """Give ``values`` to the process after this one, which takes what it is given in this order; nobody waits."""
        raise NotImplementedError("a process that is alone has nobody to give to")

    def take(self, values: Tensor) -> Tensor:
        """What the process before this one hands on next, of the shape and dtype of ``values``."""
        raise NotImplementedError("nobody gives to a process that is alone")

    def all_taken(self) -> None:
        """Wait until others have taken what this process handed on."""

    def told(self, word: Any) -> list[Any]:
        """What each process says, as JSON has it, in their order."""
        return [word]

    def says(self, doing: str) -> None:
        """What this process is at, in words: what others say of it where it is not heard of any more."""

    @property
    def doing(self) -> str:
        """What was said last."""
        return ""

    def hushed(self, error: BaseException) -> bool:
        """Tell the others that this process ends with ``error``; whether the first one, which speaks for all, tells
        people why."""
        return False

    @property
    def worked(self) -> float:
        """Seconds since it joined the others in which it did not wait for them."""
        return time.perf_counter() - self.began - self.waited

    def agree(self, asked: Mapping[str, Any]) -> None:
        """Nothing, where every process says the same.

        Raises:
            ProcessError: some say something else; says what.
        """


ALONE = World()
