"""Runs that end in their middle, and what they leave."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify.journal.record import Record

IDS = [torch.arange(64).view(4, 16) % 57 + 3, torch.arange(64).view(4, 16) * 7 % 57 + 3]


@contextmanager
def interrupted_after(count: int) -> Iterator[list[int]]:
    """A run ends like one whose user pressed Ctrl-C once so many parts are finished."""
    real, done = Record.add, [0]

    def add(self: Record, *given: Any) -> None:
        real(self, *given)
        done[0] += 1
        if done[0] == count:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(Record, "add", add)
        yield done


def content(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]
