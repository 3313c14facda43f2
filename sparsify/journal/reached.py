"""How far a pass has come: what is alive at a cut between blocks, kept beside its parts, so that going on runs nothing
again that lies before.

Values are bytes in a file of each process's own; which they are, and their digests, is said by one small file that is
at every moment the older one or the new one. They are large: the older go as soon as the new are there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsify.durable import write_whole
from sparsify.errors import BackendError, CheckpointError, ProcessError, SpecError
from sparsify.journal.journal import Kept
from sparsify.journal.left import ASKED
from sparsify.journal.record import damaged, read_span, sealed_line, span_of, span_to, text_of
from sparsify.tensors import write_from
from sparsify.world.world import World

REACHED = "reached.json"
_PLAIN = (bool, int, float, str, type(None))


# A value by whose it is, and its name.
Value = tuple[Sequence[Any], Any]


class Reached:
    """What is kept of how far one pass has come; every process of ``world`` makes and calls it alike.

    Raises:
        ProcessError: it is to be kept, and a process does not see the folder.
    """

    def __init__(self, kept: Kept, world: World) -> None:
        self._kept, self._world = kept, world
        self._folder: Path | None = None if kept.journal is None else kept.journal.folder
        if world.divided and (kept.every or kept.begun):
            said = world.told(None if self._folder is None else str(self._folder))[0]
            self._folder = None if said is None else Path(said)
        if world.divided and kept.every and self._folder is not None:
            self._check_seen(self._folder)

    def due(self, blocks: int) -> bool:
        """Whether to keep it now that so many blocks are done."""
        return self._folder is not None and self._kept.every > 0 and blocks % self._kept.every == 0

    def keep(self, step: int, values: Iterable[Value]) -> None:
        """Keep the ``values`` of this process, with which ``step`` begins, in the place of those that were kept before.

        Raises:
            BackendError: they cannot be written; what was kept before still is. SpecError: a value of no known kind.
        """
        assert self._folder is not None
        path = self._folder / f"reached-{self._kept.number}-{step}-{self._world.rank}.bin"
        try:
            listed = _write(path, values)
            whole = self._world.told({"file": path.name, "values": listed})
            if self._world.leads:
                said = {"pass": self._kept.number, "step": step, "ranks": whole}
                write_whole(self._folder / REACHED, sealed_line(json.dumps(said)), mode=0o600)
            # None of the older ones goes before all processes know of the new.
            self._world.told(None)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise BackendError(
                f"journal {self._folder}",
                found=f"activations cannot be written ({error})",
                do="What was finished is kept: see to the cause and pass --resume, or leave out --checkpoint-every",
            ) from error
        self._remove_others(path)

    def load(self) -> tuple[int, Iterator[Value]] | None:
        """The step with which the pass goes on, and what is alive before it; None where nothing was kept of it.

        Raises:
            CheckpointError: it is not what was written.
        """
        if self._folder is None or not self._kept.begun:
            return None
        said = self._world.told(_read(self._folder) if self._world.leads else None)[0]
        if said is None or said["pass"] != self._kept.number:
            return None
        own = said["ranks"][self._world.rank]
        self._remove_others(self._folder / own["file"])
        return said["step"], _values(self._folder, own)

    def damaged(self, found: str) -> CheckpointError:
        assert self._folder is not None
        return damaged(self._folder, f"{REACHED}: {found}")

    def _check_seen(self, folder: Path) -> None:
        try:
            seen = hashlib.blake2b((folder / ASKED).read_bytes()).hexdigest()
        except OSError as error:
            seen = str(error.strerror)
        first, *others = self._world.told(seen)
        if blind := next((rank for rank, own in enumerate(others, 1) if own != first), 0):
            raise ProcessError(
                f"--checkpoint-every by {self._world.size} processes",
                found=f"process {blind} does not see {folder}, beside the output, where each keeps its own",
                do="Choose an output on a disk that all machines see, or leave out --checkpoint-every",
            )

    def _remove_others(self, path: Path) -> None:
        """This process's files but ``path``."""
        for other in path.parent.glob(f"reached-*-{self._world.rank}.bin"):
            if other != path:
                other.unlink(missing_ok=True)


def _write(path: Path, values: Iterable[Value]) -> list[Any]:
    """Raises:
    OSError: they cannot be written. SpecError: a value of no known kind.
    """
    end, listed = 0, []
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:

        def told(value: Any, key: Sequence[Any]) -> Any:
            nonlocal end
            if isinstance(value, Tensor):
                compact, way = _compact(value)
                span = span_to(compact, end)
                write_from(fd, compact, end)
                end += span.size
                return {"tensor": span.as_list(), **way}
            if isinstance(value, (list, tuple)):
                return {"list": [told(each, key) for each in value], "tuple": isinstance(value, tuple)}
            if isinstance(value, _PLAIN):
                return {"plain": value}
            raise SpecError(
                "--checkpoint-every",
                found=f"a {type(value).__name__} between two blocks ({key[-1]}), which is not kept",
                do="Leave it out",
            )

        for key, value in values:
            listed.append([list(key), told(value, key)])
        os.fsync(fd)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
    return listed


def _compact(value: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """``value`` without what it holds twice, in the order in which it lies in memory, and how it is that again: which
    way numbers lie may decide in which order they are added.
    """
    own = value.detach().cpu()
    strides = own.stride()
    order = sorted(range(own.dim()), key=lambda axis: -strides[axis])
    for axis, (size, stride) in enumerate(zip(own.shape, strides, strict=True)):
        if stride == 0 and size > 1:
            own = own.narrow(axis, 0, 1)
    return own.permute(order).contiguous(), {"order": order, "shape": list(value.shape)}


def _values(folder: Path, own: dict[str, Any]) -> Iterator[Value]:
    path = folder / own["file"]

    def found(told: dict[str, Any], key: Sequence[Any]) -> Any:
        if "tensor" in told:
            compact = read_span(path, span_of(*told["tensor"]), f"what was alive of {key[-1]}")
            back = sorted(range(len(told["order"])), key=told["order"].__getitem__)
            return compact.permute(back).expand(told["shape"])
        if "list" in told:
            each = [found(one, key) for one in told["list"]]
            return tuple(each) if told["tuple"] else each
        return told["plain"]

    return ((key, found(told, key)) for key, told in own["values"])


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        content = (folder / REACHED).read_bytes()
    except FileNotFoundError:
        return None
    line, end = content[:-1], content[-1:]
    text = text_of(line) if end == b"\n" else None
    if text is None:
        raise damaged(folder, f"{REACHED} is not what was written")
    said: dict[str, Any] = json.loads(text)
    return said
