"""Kill a compile at random moments, go on with it, and compare what it wrote with what one that nobody killed wrote.

A quarter of the moments are spread over the whole run, which on a small model is tracing for the most part; the others
over its finished parts: the kill comes a few milliseconds after the journal has so many lines.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import sparsify

IDS = [torch.arange(512).view(8, 64) % 57 + 3, torch.arange(512).view(8, 64) * 7 % 57 + 3]
JOBS: dict[str, dict[str, Any]] = {
    "sparsegpt": {"passes": ["sparsegpt:2:4"], "checkpoint_every": 2},
    "twin, then refine": {"passes": ["twin:2:4", "refine:epochs=2,batch=8"], "checkpoint_every": 1},
    "block": {"passes": ["wanda:2:4", "round:int4"], "schedule": "block"},
    "packed": {"passes": ["permute:2:4", "wanda:2:4"], "to": "packed:choice=smallest"},
    "onnx": {"passes": ["gblm:2:4"], "to": "onnx"},
    "smaller": {"passes": ["llm-pruner:25%", "sparsegpt:2:4"]},
}


# A part takes no longer, on these models.
_PART = 0.02


@dataclass(frozen=True)
class Moment:
    """When a run is killed: so many seconds after its journal has so many parts."""

    parts: int
    seconds: float

    def wait(self, out: Path, child: int) -> int:
        """Until it has come, or the run is over; the most parts that were seen."""
        seen = 0
        while seen < self.parts and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.001)
            with contextlib.suppress(FileNotFoundError):
                seen = max(seen, parts_of(out))
        time.sleep(self.seconds)
        return seen


@dataclass
class Killed:
    """One run: when it was killed, how many parts were kept then, and whether it was like one that nobody killed."""

    job: str
    moment: Moment
    kept: int
    same: bool

    def __str__(self) -> str:
        when = f"{self.moment.parts:5} {self.moment.seconds * 1000:8.0f}"
        return f"{self.job:18} {when} {self.kept:5} {'same' if self.same else 'OTHER'}"


def kill_at_random(folder: Path, count: int, seed: int, said: Callable[[str], None]) -> list[Killed]:
    """``count`` runs, each of one of :data:`JOBS`."""
    from support.families import deep

    deep("llama", 4).save_pretrained(folder / "model")
    # Times in what is written, the same in all runs.
    os.environ["SOURCE_DATE_EPOCH"] = "1000000000"
    chance, known = random.Random(seed), dict[str, tuple[float, int, dict[str, str]]]()
    done = []
    for number in range(count):
        job = list(JOBS)[number % len(JOBS)]
        if job not in known:
            # Here: what it imports is not imported by every child.
            compile_job(folder, job, folder / "first" / job / "out")
            parts = run(folder, job, folder / "parts" / job / "out", Moment(1 << 20, 0))
            started = time.perf_counter()
            run(folder, job, folder / "whole" / job / "out", None)
            known[job] = time.perf_counter() - started, parts, content(folder / "whole" / job / "out")
        longest, parts, expected = known[job]
        moment = Moment(chance.randint(1, parts), chance.uniform(0, _PART))
        if number % 4 == 0:
            moment = Moment(0, chance.uniform(0, longest))
        done.append(killed(folder, job, folder / str(number) / "out", moment, expected))
        said(str(done[-1]))
    return done


def killed(folder: Path, job: str, out: Path, moment: Moment, expected: dict[str, str]) -> Killed:
    """Kill a run, and let another go on with it."""
    run(folder, job, out, moment)
    kept = parts_of(out)
    if not out.exists():
        run(folder, job, out, None, resume=kept > 0)
        assert not [path for path in out.parent.iterdir() if path.name.startswith(".")]
    return Killed(job, moment, kept, content(out) == expected)


def run(folder: Path, job: str, out: Path, moment: Moment | None, *, resume: bool = False) -> int:
    """One compile in a child of this process, which is killed at that moment; the most parts that were seen of it.

    Raises:
        RuntimeError: it failed.
    """
    child = os.fork()
    if child == 0:
        try:
            compile_job(folder, job, out, resume=resume)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    seen = 0
    if moment is not None:
        seen = moment.wait(out, child)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if status != 0 and not (os.WIFSIGNALED(status) and moment is not None):
        raise RuntimeError(f"{job} ended with status {status}")
    return seen


def compile_job(folder: Path, job: str, out: Path, *, resume: bool = False) -> None:
    sparsify.compile(folder / "model", calibration=IDS, output=out, resume=resume, **JOBS[job])


def parts_of(out: Path) -> int:
    """How many finished parts are kept of a run to ``out``."""
    found = [path.read_bytes().count(b"\n") for path in out.parent.glob(f".{out.name}.unfinished-*/journal.jsonl")]
    return max(found, default=0)


def content(folder: Path) -> dict[str, str]:
    """Every file by its digest."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
