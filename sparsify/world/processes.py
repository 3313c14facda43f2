"""Several processes that know of each other, by ``torch.distributed``: gloo between CPUs, NCCL between GPUs.

Whoever waits for the others looks meanwhile whether they are still there: what became of one that is not is an error
here, and no wait without an end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparsify.errors import ProcessError, first_line
from sparsify.world.watch import Watch
from sparsify.world.world import World

# Seconds between looks at what is under way: at first often, for most is done at once.
_SOON, _LATE = 2e-5, 2e-3
# Bytes of what is told at once.
_SHORT = 1024


class Processes(World):
    """This process as ``rank`` of ``size``.

    Args:
        device: where tensors lie that are sent; of gloo the CPU.
        watch: knows what becomes of the others.
    """

    def __init__(self, rank: int, size: int, device: torch.device, watch: Watch) -> None:
        super().__init__()
        self.rank, self.size, self.device, self._watch = rank, size, device, watch
        # What others have not taken yet, which must stay where it is until then.
        self._handed: list[tuple[Any, Tensor]] = []
        # This one and the next for each process, once they have lined up.
        self._pairs: list[Any] = []

    def says(self, doing: str) -> None:
        self._watch.doing = doing

    def summed(self, values: Tensor) -> Tensor:
        return self._reduced(values, dist.ReduceOp.SUM)

    def summed_by(self, values: Tensor, owner: int) -> Tensor:
        there = values.to(self.device).contiguous()
        self._wait(lambda: dist.reduce(there, owner, async_op=True), None)
        # In a ring, or a tree: all but the owner pass on what they have added up.
        self.sent += there.numel() * there.element_size() if owner != self.rank else 0
        return there.to(values.device)

    def greatest(self, values: Tensor) -> Tensor:
        return self._reduced(values, dist.ReduceOp.MAX)

    def _reduced(self, values: Tensor, how: Any) -> Tensor:
        there = values.to(self.device).contiguous()
        self._wait(lambda: dist.all_reduce(there, how, async_op=True), None)
        # In a ring each passes on all parts but one twice: as they are added up, and as they are whole.
        self.sent += 2 * there.numel() * there.element_size() * (self.size - 1) // self.size
        return there.to(values.device)

    def share_gradients(self, parameters: Sequence[Tensor]) -> None:
        # One process may have had nothing to find any by.
        own = [torch.zeros_like(value) if value.grad is None else value.grad for value in parameters]
        whole = self.summed(torch.cat([gradient.flatten() for gradient in own]))
        for value, part in zip(parameters, whole.split([value.numel() for value in parameters]), strict=True):
            value.grad = part.view_as(value)

    def gathered(self, part: Tensor) -> list[Tensor]:
        row = part[:1].numel() * part.element_size()
        told = self.told([len(part), row])
        most, row = max(length for length, _ in told), max(size for _, size in told)
        # As bytes, which every backend has, and of one length, as all of them want it.
        own = torch.zeros(most * row, dtype=torch.uint8, device=self.device)
        if part.numel():
            own[: len(part) * row] = part.contiguous().view(-1).view(torch.uint8).to(self.device)
        parts = [torch.empty_like(own) for _ in range(self.size)]
        if len(own):
            self._wait(lambda: dist.all_gather(parts, own, async_op=True), own)
        return [
            found[: length * row].view(part.dtype).view(length, *part.shape[1:]).to(part.device)
            for found, (length, _) in zip(parts, told, strict=True)
        ]

    def given(self, values: Tensor, owner: int) -> Tensor:
        there = values.contiguous().view(-1).view(torch.uint8).to(self.device)
        if values.numel():
            self._wait(lambda: dist.broadcast(there, owner, async_op=True), there if owner == self.rank else None)
        return there.view(values.dtype).view(values.shape).to(values.device)

    def line_up(self) -> None:
        if not self._pairs:
            # Broadcasts in groups of two, for gloo does not say whether what one sent to another has arrived.
            with self._explained():
                ends = [(rank, (rank + 1) % self.size) for rank in range(self.size)]
                self._pairs = [dist.new_group(sorted(pair)) for pair in ends]

    def hand_on(self, values: Tensor) -> None:
        there = values.contiguous().view(-1).view(torch.uint8).to(self.device)
        if there.numel():
            with self._explained():
                work = dist.broadcast(there, self.rank, group=self._pairs[self.rank], async_op=True)
            self._handed.append((work, there))
            self.sent += there.numel()

    def take(self, values: Tensor) -> Tensor:
        there = torch.empty(values.numel() * values.element_size(), dtype=torch.uint8, device=self.device)
        before = (self.rank - 1) % self.size
        if there.numel():
            self._wait(lambda: dist.broadcast(there, before, group=self._pairs[before], async_op=True), None)
        return there.view(values.dtype).view(values.shape).to(values.device)

    def all_taken(self) -> None:
        while self._handed:
            work, _ = self._handed[0]
            self._wait(lambda work=work: work, None)
            del self._handed[0]

    def told(self, word: Any) -> list[Any]:
        text = json.dumps(word).encode()
        framed = f"{len(text)} ".encode() + text
        # What is short is told at once; of what is long the length is.
        told = self._texts(framed, _SHORT)
        longest = max(len(size) + 1 + int(size) for size, _, _ in (each.partition(b" ") for each in told))
        if longest > _SHORT:
            told = self._texts(framed, longest)
        return [json.loads(rest[: int(size)]) for size, _, rest in (each.partition(b" ") for each in told)]

    def _texts(self, text: bytes, size: int) -> list[bytes]:
        own = torch.zeros(size, dtype=torch.uint8)
        given = torch.frombuffer(bytearray(text[:size]), dtype=torch.uint8)
        own[: len(given)] = given
        own = own.to(self.device)
        texts = [torch.empty_like(own) for _ in range(self.size)]
        self._wait(lambda: dist.all_gather(texts, own, async_op=True), own)
        return [bytes(each.cpu().numpy()) for each in texts]

    def agree(self, asked: Mapping[str, Any]) -> None:
        first, *others = self.told(dict(asked))
        for rank, other in enumerate(others, 1):
            differing = [name for name in {**first, **other} if first.get(name) != other.get(name)]
            if differing:
                said = (f"{name} ({_short(first.get(name))}, {_short(other.get(name))})" for name in differing)
                raise ProcessError(
                    f"processes 0 and {rank} of one job",
                    found=f"they were asked otherwise: {'; '.join(said)}",
                    do="Give every process the same command, versions, model and data",
                )

    def hushed(self, error: BaseException) -> bool:
        return not self.leads and self._watch.hears_leader(str(error) or type(error).__name__)

    @property
    def doing(self) -> str:
        return self._watch.doing

    def _wait(self, begin: Any, sent: Tensor | None) -> None:
        """Begin something that all do together, and wait until it is done.

        Raises:
            ProcessError: another process failed, ended, or is not heard of any more.
        """
        started = time.perf_counter()
        with self._explained():
            work, pause = begin(), _SOON
            while not work.is_completed():
                self._watch.check()
                time.sleep(pause)
                pause = min(pause * 1.5, _LATE)
            work.wait()
        self.waited += time.perf_counter() - started
        if sent is not None:
            self.sent += sent.numel() * sent.element_size() * (self.size - 1)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            # Most often the other end of a connection is gone; what became of it is told a moment later.
            raise self._watch.explained(first_line(error)) from error


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
