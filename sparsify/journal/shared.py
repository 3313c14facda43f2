"""What one process's journal holds of a pass, for all processes of a job: the first one keeps, the others are told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sparsify.journal.journal import Kept
from sparsify.journal.record import Entry, span_of
from sparsify.world.world import World


@dataclass(frozen=True)
class Shared(Kept):
    """What is kept of one pass, as every process finds it.

    Attributes:
        known: by its key, what the first process has kept.
    """

    known: Mapping[str, Entry] = field(default_factory=dict)

    @property
    def begun(self) -> bool:
        return bool(self.known)

    def find(self, key: str) -> Entry | None:
        return self.known.get(key)


@dataclass(frozen=True)
class Told(Entry):
    """A part whose tensors the first process reads, and gives the others: all ask for them in the same order.

    Attributes:
        world: whom they are given. own: the part itself, in the process that keeps it.
    """

    world: World
    own: Entry | None

    def read(self, name: str) -> Tensor:
        """As :meth:`Entry.read`; every process calls it."""
        span = self.spans[name]
        value = torch.empty(span.shape, dtype=span.dtype) if self.own is None else self.own.read(name)
        return self.world.given(value, 0)


def shared(kept: Kept, world: World) -> Kept:
    """``kept`` of the first process, for all of ``world``; each calls it at the same place."""
    if not world.divided:
        return kept
    entries = {} if kept.journal is None else kept.journal.record.entries
    own = {key: entry for (number, key), entry in entries.items() if number == kept.number}
    said = {
        key: [dict(entry.row), {name: span.as_list() for name, span in entry.spans.items()}]
        for key, entry in own.items()
    }
    known = {
        key: Told(Path(), row, {name: span_of(*of) for name, of in spans.items()}, world, own.get(key))
        for key, (row, spans) in world.told(said)[0].items()
    }
    return Shared(kept.number, kept.journal, kept.every, known)
