"""One type through all steps, in a process of its own, with bounds on its time and its memory."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

# Bytes of address space beyond what the parent has.
MEMORY = 6 << 30


def attempt(kind: str, place: Path, say: Callable[[dict[str, Any]], None], steps: Sequence[str] | None = None) -> None:
    """Run the steps of one type; each verdict goes to ``say`` as soon as it is known."""
    from breadth.model import Unusable, make
    from breadth.steps import STEPS, NotReached, Trial, Wrong
    from sparsify.errors import SparsifyError, first_line

    began = time.perf_counter()
    say({"starts": "model"})
    try:
        tiny = make(kind, place / "dense")
    except Unusable as error:
        say({"step": "model", "verdict": "unusable", "reason": str(error)})
        return
    except Exception as error:
        say({"step": "model", "verdict": "unusable", "reason": f"{type(error).__name__}: {first_line(error)}"[:300]})
        return
    config = tiny.model.config
    say({
        "step": "model", "verdict": "right", "class": type(tiny.model).__name__, "seconds": _since(began),
        "inputs": {n: list(t.shape) for n, t in tiny.batches[0].items()},
        "parameters": sum(p.numel() for p in tiny.model.parameters()), "type": config.model_type,
    })  # fmt: skip
    trial = Trial(tiny, place)
    for name in steps or STEPS:
        began, found = time.perf_counter(), {"step": name, "verdict": "right"}
        say({"starts": name})
        try:
            STEPS[name](trial)
        except Wrong as error:
            found |= {"verdict": "wrong", "reason": str(error)[:400]}
        except NotReached as error:
            found |= {"verdict": "not reached", "reason": str(error)}
        except SparsifyError as error:
            found |= {"verdict": "refused", "reason": _shown(error, place)}
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            ours = [
                f
                for f in traceback.extract_tb(error.__traceback__)
                if "sparsify" in f.filename and "/tools/" not in f.filename
            ]
            where = f"{Path(last.filename).name}:{last.name}" + (
                f", from {Path(ours[-1].filename).name}:{ours[-1].name}" if ours else ""
            )
            found |= {
                "verdict": "traceback" if ours else "transformers fails",
                "reason": f"{type(error).__name__}: {_shown(error, place)} ({where})"[:400],
            }
        say(found | {"seconds": _since(began)})
    say({"remarks": trial.remarks, "numbers": trial.numbers})


def check(kind: str, place: Path, steps: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """:func:`attempt` in this process: each step's verdict, with the reason of those that are not right."""
    result: dict[str, Any] = {"kind": kind, "steps": {}}

    def take(said: dict[str, Any]) -> None:
        _take(result, said, "")

    attempt(kind, place, take, steps)
    found: dict[str, dict[str, Any]] = result["steps"]
    return found


def isolated(kind: str, seconds: float, steps: Sequence[str] | None = None) -> dict[str, Any]:
    """:func:`attempt` in a fork of at most ``seconds`` of the processor; what runs longer ends there."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _child(kind, writer, steps, seconds)
    os.close(writer)
    result: dict[str, Any] = {"kind": kind, "steps": {}}
    # Of the clock more: a process that waits uses none of the processor.
    running, until, rest = "model", time.monotonic() + 5 * seconds, b""
    killed = False
    while True:
        left = until - time.monotonic()
        ready = select.select([reader], [], [], max(0.0, left))[0]
        if not ready:
            killed = True
            break
        if not (part := os.read(reader, 1 << 16)):
            break
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            running = _take(result, json.loads(line), running)
    os.close(reader)
    if killed:
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    _, status, used = os.wait4(child, 0)
    killed = killed or (os.WIFSIGNALED(status) and used.ru_utime + used.ru_stime >= seconds - 5)
    result["seconds"] = round(used.ru_utime + used.ru_stime, 1)
    if killed or (status != 0 and running):
        why = f"more than {seconds:.0f} s" if killed else f"the process ended with status {status}"
        result["steps"][running or "end"] = {"verdict": "timeout" if killed else "crash", "reason": why}
    return result


def _take(result: dict[str, Any], said: dict[str, Any], running: str) -> str:
    if "starts" in said:
        return str(said["starts"])
    if "step" in said:
        result["steps"][said.pop("step")] = said
        return ""
    result |= said
    return running


def _child(kind: str, writer: int, steps: Sequence[str] | None, seconds: float) -> None:
    try:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds),) * 2)
        resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY,) * 2)
        quiet = os.open(os.devnull, os.O_WRONLY)
        if not os.environ.get("BREADTH_DEBUG"):
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
        warnings.simplefilter("ignore")

        def say(what: dict[str, Any]) -> None:
            os.write(writer, json.dumps(what).encode() + b"\n")

        with tempfile.TemporaryDirectory(prefix="breadth-") as folder:
            attempt(kind, Path(folder), say, steps)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _since(began: float) -> float:
    return round(time.perf_counter() - began, 2)


def _shown(error: BaseException, place: Path) -> str:
    return " ".join(str(error).replace(str(place), "").split())[:400]
