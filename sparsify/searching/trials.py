"""Trials that are kept: a file of JSON lines beside the output, from which an interrupted search goes on.

A file is for one question, which its first line holds and its name ends in a digest of: the model, the data, the pass
and all else that decides what a trial gives. The budget is not among that: another budget finds the same trials.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsify.durable import make_folders, sync, write_whole
from sparsify.errors import BackendError, CheckpointError

_FORMAT = 1
# A file of more bytes is none of ours.
_MOST = 1 << 28


@dataclass(frozen=True)
class Trial:
    """One setting, and what it gave.

    Attributes:
        words: what it was for. shares: of each kind or part, which share of its weights goes; 0: it stays dense.
        spec, ignore: the pass, and the patterns of --ignore, that prune so.
        perplexity: infinity where it is no number. sparsity: of all weights that may be pruned.
        refused: what the pass said that could not prune so, a model whose activations have died say; else empty.
    """

    number: int
    words: str
    shares: Mapping[str, float]
    spec: str
    ignore: tuple[str, ...]
    perplexity: float
    sparsity: float
    seconds: float
    refused: str = ""

    def as_dict(self) -> dict[str, Any]:
        finite = math.isfinite(self.perplexity)
        # JSON knows no infinity.
        return {**vars(self), "shares": dict(self.shares), "perplexity": self.perplexity if finite else None}

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Trial:
        """What :meth:`as_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        loss = found["perplexity"]
        return cls(
            number=int(found["number"]),
            words=str(found["words"]),
            shares={str(name): float(share) for name, share in found["shares"].items()},
            spec=str(found["spec"]),
            ignore=tuple(map(str, found["ignore"])),
            perplexity=math.inf if loss is None else float(loss),
            sparsity=float(found["sparsity"]),
            seconds=float(found["seconds"]),
            refused=str(found["refused"]),
        )


class Trials:
    """Trials of one question, by their settings.

    Args:
        out: the output of the search; the trials lie in the folder ``OUT.search`` beside it. None keeps them in memory.

    Raises:
        CheckpointError: a file of trials that is none. BackendError: it cannot be read.
    """

    def __init__(self, question: Mapping[str, Any], out: Path | None) -> None:
        text = json.dumps({"format": _FORMAT, **question}, sort_keys=True)
        self.path: Path | None = None
        self._first = json.dumps({"question": json.loads(text)})
        self._known: dict[str, Trial] = {}
        if out is not None:
            digest = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
            self.path = work_folder(out) / f"trials-{digest}.jsonl"
            self._read(self.path)
        self.resumed = len(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def find(self, shares: Mapping[str, float]) -> Trial | None:
        """The trial of that setting, if there was one."""
        return self._known.get(_key(shares))

    def keep(self, trial: Trial) -> None:
        """Add a trial, on the disk when this returns.

        Raises:
            BackendError: it cannot be written.
        """
        self._known[_key(trial.shares)] = trial
        if self.path is None:
            return
        try:
            make_folders(self.path.parent)
            if not self.path.exists():
                write_whole(self.path, f"{self._first}\n".encode())
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(trial.as_dict()) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise BackendError(
                f"trials in {self.path}", found=f"they cannot be written ({error})", do="Choose another place with -o"
            ) from error

    def _read(self, path: Path) -> None:
        try:
            if not path.exists():
                return
            if not path.is_file() or path.stat().st_size > _MOST:
                raise self._broken("no file of trials")
            content = path.read_bytes()
        except OSError as error:
            raise BackendError(
                f"trials in {path}", found=f"they cannot be read ({error})", do="Choose another place with -o"
            ) from error
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                if number == 1:
                    if json.loads(line) != json.loads(self._first):
                        raise self._broken("those of another question")
                    continue
                trial = Trial.of(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise self._broken(f"a line {number} that is no trial") from error
            self._known[_key(trial.shares)] = trial
        if len(whole) < len(content):
            # A job was killed while it wrote its last line.
            write_whole(path, whole)
            sync(path.parent)

    def _broken(self, found: str) -> CheckpointError:
        return CheckpointError(f"trials in {self.path}", found=found, do="Remove that file, or choose another -o")


def work_folder(out: Path) -> Path:
    """Where the trials of a search for ``out`` lie."""
    return out.with_name(f"{out.name}.search")


def _key(shares: Mapping[str, float]) -> str:
    return json.dumps(dict(shares), sort_keys=True)
