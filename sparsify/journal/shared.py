"""What one process's journal holds of a pass, for all processes of a job: the first one keeps, the others are told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.journal.journal import Kept
from sparsify.journal.record import Entry, Span
from sparsify.world.world import World


@dataclass(frozen=True)
class Shared(Kept):
    """What is kept of one pass, as every process finds it.

    Attributes:
        known: by its key, what the first process has kept. world: whom it is told.
    """

    known: Mapping[str, Entry] | None = None

    def find(self, key: str) -> Entry | None:
        return (self.known or {}).get(key)


@dataclass(frozen=True)
class Told(Entry):
    """A part whose tensors the first process reads, and gives the others: all ask for them in the same order."""

    world: World | None = None
    own: Entry | None = None

    def read(self, name: str) -> Tensor:
        """As :meth:`Entry.read`; every process calls it."""
        assert self.world is not None
        span = self.spans[name]
        value = torch.empty(span.shape, dtype=span.dtype) if self.own is None else self.own.read(name)
        return self.world.given(value, 0)


def shared(kept: Kept, world: World) -> Kept:
    """``kept`` of the first process, for all of ``world``; each calls it at the same place."""
    if not world.divided:
        return kept
    entries = {} if kept.journal is None else kept.journal.record.entries
    own = {key: entry for (number, key), entry in entries.items() if number == kept.number}
    said: list[dict[str, Any]] = [
        {"key": key, "row": dict(entry.row), "spans": {n: _said(span) for n, span in entry.spans.items()}}
        for key, entry in own.items()
    ]
    known = {
        each["key"]: Told(
            Path(), each["row"], {n: _span(of) for n, of in each["spans"].items()}, world, own.get(each["key"])
        )
        for each in world.told(said)[0]
    }
    return Shared(kept.number, kept.journal, known)


def _said(span: Span) -> list[Any]:
    return [str(span.dtype).removeprefix("torch."), list(span.shape)]


def _span(said: list[Any]) -> Span:
    dtype, shape = said
    return Span(getattr(torch, dtype), tuple(shape), 0, "")
