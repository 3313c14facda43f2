"""Whether the other processes of a job are still there: each says so once a second, with what it is at."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

from sparsify.errors import ProcessError

# Seconds between two signs of life; how long one who hears that another failed may take to end by itself.
_EVERY, _GRACE = 1.0, 5.0


class Watch:
    """A thread that tells a store shared by all that this process lives, and hears what became of the others.

    Args:
        store: a ``torch.distributed`` store of this thread's own. patience: seconds without a sign of life after which
            a process counts as hung.
    """

    def __init__(self, store: Any, rank: int, size: int, patience: float) -> None:
        self._store, self._rank, self._size, self._patience = store, rank, size, patience
        self.doing = "starting"
        self._gone: ProcessError | None = None
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._beat(0)
        self._thread = threading.Thread(target=self._run, name="sparsify-watch", daemon=True)

    def start(self) -> None:
        """Once all have given a first sign of life."""
        self._thread.start()

    def stop(self, failed: str | None = None) -> None:
        """End, and tell the others why where this process ``failed``."""
        self._tell_end(failed)
        self._stop.set()

    def hears_leader(self, failed: str) -> bool:
        """Tell that this process ``failed``, and whether the first one ends with a word of its own, which it takes a
        moment to."""
        self._tell_end(failed)
        deadline = time.monotonic() + 4 * _EVERY
        with contextlib.suppress(Exception):
            while time.monotonic() < deadline:
                with self._lock:
                    if self._has_ended(0):
                        return True
                time.sleep(0.1)
        return False

    def _tell_end(self, failed: str | None) -> None:
        with contextlib.suppress(Exception), self._lock:
            # Whether the store is still there does not matter any more.
            if not self._has_ended(self._rank):
                self._store.set(f"ended/{self._rank}", json.dumps({"failed": failed, "doing": self.doing}))

    def check(self) -> None:
        """Raises:
        ProcessError: another process failed, ended or hangs.
        """
        if self._gone is not None:
            raise self._gone

    def explained(self, found: str) -> ProcessError:
        """What became of the others, where something that all do together failed here: ``found`` is all we know."""
        deadline = time.monotonic() + 2 * _EVERY + 0.5
        while self._gone is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return (
            self._gone
            or self._dead()
            or ProcessError(
                f"process {self._rank} of {self._size}, {self.doing}",
                found=f"the others cannot be reached ({found})",
                do="Look at what they said last; the same command with --resume goes on from there",
            )
        )

    def _run(self) -> None:
        number, seen = 0, dict[int, tuple[str, float]]()
        while not self._stop.wait(_EVERY):
            number += 1
            try:
                with self._lock:
                    self._beat(number)
                    ended = self._ended()
                    beats = {r: self._store.get(f"beat/{r}").decode() for r in range(self._size) if r != self._rank}
            except Exception as error:  # whatever a store that is gone says
                self._end(ProcessError(
                    f"process {self._rank} of {self._size}, {self.doing}",
                    found=f"whoever started the processes is gone ({type(error).__name__})",
                    do="Start them again; --resume goes on from there",
                ))  # fmt: skip
                return
            now = time.monotonic()
            if ended is not None:
                self._end(ended)
                return
            for rank, beat in beats.items():
                if seen.get(rank, ("", 0.0))[0] != beat:
                    seen[rank] = beat, now
                elif now - seen[rank][1] > self._patience and not self._has_ended(rank):
                    self._end(self._hung(rank, json.loads(beat)))
                    return

    def _beat(self, number: int) -> None:
        said = {"number": number, "doing": self.doing, "host": socket.gethostname(), "pid": os.getpid()}
        self._store.set(f"beat/{self._rank}", json.dumps(said))

    def _has_ended(self, rank: int) -> bool:
        return bool(self._store.check([f"ended/{rank}"]))

    def _ended(self) -> ProcessError | None:
        """Another process that failed."""
        for rank in range(self._size):
            if rank == self._rank or not self._has_ended(rank):
                continue
            said = json.loads(self._store.get(f"ended/{rank}").decode())
            if said["failed"] is not None:
                return ProcessError(
                    f"process {rank} of {self._size}, {said['doing']}",
                    found=f"it failed: {said['failed']}",
                    do="Nothing was written",
                )
        return None

    def _dead(self) -> ProcessError | None:
        """Another process of this machine that is there no more and could not say why."""
        with contextlib.suppress(Exception), self._lock:
            for rank in range(self._size):
                beat = json.loads(self._store.get(f"beat/{rank}").decode())
                if beat["host"] == socket.gethostname() and _is_gone(beat["pid"]) and not self._has_ended(rank):
                    return ProcessError(
                        f"process {rank} of {self._size}, {beat['doing']}",
                        found="it is gone without a word: ended by a signal",
                        do="Look at memory (a system that has none left ends processes); --resume goes on from there",
                    )
        return None

    def _hung(self, rank: int, beat: dict[str, Any]) -> ProcessError:
        if beat["host"] == socket.gethostname():
            # One that is stopped ends in no other way, and whoever started it waits for it.
            with contextlib.suppress(OSError):
                os.kill(beat["pid"], signal.SIGKILL)
        return ProcessError(
            f"process {rank} of {self._size}, {beat['doing']}",
            found=f"not heard of for {self._patience:g} s: dead, stopped, or its machine is out of reach",
            do="See to the cause, and pass --resume; SPARSIFY_PATIENCE=SECONDS waits longer",
        )

    def _end(self, error: ProcessError) -> None:
        """Tell the main thread, which sees it where it waits for others; one that does not wait is ended as by a
        signal, and one that does not heed that at last for good."""
        self._gone = error
        if self._stop.wait(_GRACE):
            return
        os.kill(os.getpid(), signal.SIGTERM)
        if self._stop.wait(_GRACE):
            return
        os._exit(1)


def _is_gone(pid: int) -> bool:
    """Whether no such process runs on this machine; what its parent has not asked after yet is gone too."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except ProcessLookupError:
        return True
    except OSError:
        return False  # another user's, or a system without /proc
    return state[:1] in (["Z"], ["X"])
