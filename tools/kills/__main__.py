"""Kill every writer at every call by which it puts something in its place, and look at what is there afterwards.

    python tools/kills [--writers hf,packed] [--json]     # all writers: some minutes on two cores
    python tools/kills --resume 20 [--seed 0]             # compiles killed at random moments, and gone on with

A writer runs in a forked child, in which each rename, exchange, sync, mkdir, chmod, unlink and rmdir in the output's
place is counted; before the call of a given number the child kills itself with SIGKILL. Then the next run's first
step is taken, and the output must be the older one or the new one, whole, with nothing hidden left beside it. Each
writer runs fresh and over an older output, with the system's exchange of names and (``steps``) as where there is none.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

from resumed import kill_at_random
from writers import WRITERS, Scene, Writer, make_scene

import sparsify.durable

CALLS = ("rename", "replace", "mkdir", "rmdir", "unlink", "fsync", "chmod")
# What a run counts anew, or what says how long it took: such a file is only looked at for being whole.
_EXACT = (".safetensors", ".onnx", ".data", ".txt", ".bin")


@dataclass
class Series:
    """The kills of one writer in one way. ``old``, ``new``: how often which output was there afterwards."""

    writer: str
    way: str
    kills: int = 0
    old: int = 0
    new: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.writer:14} {self.way:12} {self.kills:5} {self.old:5} {self.new:5} {self.seconds:7.0f}"


class Faults:
    """Counts the calls of this process below ``place``, and ends it before call number ``at``."""

    def __init__(self, place: Path, at: int | None) -> None:
        self.place, self.at, self.count = os.path.realpath(place), at, 0

    def install(self, *, exchange: bool) -> None:
        for name in CALLS:
            setattr(os, name, self._counted(getattr(os, name)))
        call = sparsify.durable.renameat2() if exchange else None
        counted = None if call is None else self._counted(call, second=True)
        sparsify.durable.renameat2 = lambda: counted  # type: ignore[assignment]

    def _counted(self, call: Callable[..., Any], *, second: bool = False) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._is_ours(args[1] if second else args[0], kwargs.get("dir_fd", kwargs.get("src_dir_fd"))):
                self.count += 1
                if self.count == self.at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return counted

    def _is_ours(self, what: Any, folder: int | None) -> bool:
        if isinstance(what, int):
            path = str(Path(f"/proc/self/fd/{what}").readlink())
        else:
            start = str(Path(f"/proc/self/fd/{folder}").readlink()) if folder is not None else str(Path.cwd())
            path = os.path.join(start, os.fsdecode(what))  # noqa: PTH118
        return path.startswith(self.place)


def run(work: Callable[[], None], place: Path, at: int | None, *, exchange: bool) -> int | None:
    """``work`` in a child: the number of its calls; None where it was killed.

    Raises:
        RuntimeError: it ended in any other way.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            faults = Faults(place, at)
            faults.install(exchange=exchange)
            work()
            os.write(writer, str(faults.count).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    if status != 0:
        raise RuntimeError(f"the writer ended with status {status}")
    return int(said)


def kill_everywhere(writer: Writer, scene: Scene, *, over: bool, exchange: bool) -> Series:
    """Kill at every call in turn.

    Raises:
        AssertionError: what was there afterwards was neither the older output nor the new one, or not alone.
    """
    series = Series(writer.name, ("over" if over else "fresh") + ("" if exchange else ", steps"))
    started = time.perf_counter()

    def again() -> None:
        writer.write(scene, over)

    def next_run() -> None:
        writer.next_run(scene)

    # Here, once: what it imports is not imported by every child.
    _prepare(writer, scene, over)
    again()
    _prepare(writer, scene, over)
    old = content(scene.out)
    calls = run(again, scene.place, None, exchange=exchange)
    assert calls is not None
    new = content(scene.out)
    assert new and (not over or new != old)
    for at in range(1, calls + 1):
        _prepare(writer, scene, over)
        where = f"{writer.name}, {series.way}, killed before call {at} of {calls}"
        assert run(again, scene.place, at, exchange=exchange) is None, where
        found = content(scene.out)
        # Without an exchange nothing is there for a moment, until the next run brings the older one back.
        assert found in (old, new) or not (found or exchange), f"{where}: {sorted(found)}"
        run(next_run, scene.place, None, exchange=exchange)
        if writer.is_folder:
            found = content(scene.out)
            assert found in (old, new), f"{where}: {sorted(found)} after the next run"
        series.kills += 1
        series.old, series.new = series.old + (found == old), series.new + (found == new)
        left = [str(p.relative_to(scene.place)) for p in scene.place.rglob(".*")] + [
            p.name for p in scene.temporary.iterdir()
        ]
        assert not left, f"{where}: {left} left"
    # And a run over whatever the last one left makes the new one.
    run(lambda: writer.write(scene, True), scene.place, None, exchange=exchange)
    assert content(scene.out) == new
    series.seconds = time.perf_counter() - started
    return series


def content(out: Path) -> dict[str, str]:
    """Every file of ``out`` by its digest; empty where there is none.

    Raises:
        ValueError: a JSON file that is cut off.
    """
    if out.is_file():
        return {"": hashlib.sha256(out.read_bytes()).hexdigest()}
    found = {}
    for path in out.rglob("*") if out.exists() else ():
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        if path.is_file():
            exact = path.suffix in _EXACT
            found[str(path.relative_to(out))] = hashlib.sha256(path.read_bytes()).hexdigest() if exact else "there"
            assert path.stat().st_size, path
    return found


def _prepare(writer: Writer, scene: Scene, over: bool) -> None:
    shutil.rmtree(scene.place, ignore_errors=True)
    scene.temporary.mkdir(parents=True)
    if over:
        writer.older(scene)


def resume(count: int, seed: int) -> int:
    """Kill so many compiles at random moments and go on; 0 where each wrote what one that nobody killed writes."""
    print("job                after       ms  kept")
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        done = kill_at_random(Path(folder), count, seed, lambda text: print(text, flush=True))
    same = sum(each.same for each in done)
    print(f"{same} of {count}: the bytes of a run that nobody killed ({sum(each.kept > 0 for each in done)} went on)")
    return 0 if same == count else 1


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="kills", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--writers", default=",".join(WRITERS), help="[default: %(default)s]")
    parser.add_argument("--quick", action="store_true", help="over an older output alone, with the exchange of names")
    parser.add_argument("--json", action="store_true", help="the counts as JSON")
    parser.add_argument("--resume", type=int, metavar="COUNT", help="kill so many compiles at random moments instead")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.resume is not None:
        sys.exit(resume(args.resume, args.seed))
    done = []
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        scene = make_scene(Path(folder), args.writers.split(","))
        tempfile.tempdir = str(scene.temporary)
        if not args.json:
            print("writer         way          kills   old   new seconds")
        for name in args.writers.split(","):
            writer = WRITERS[name]
            for over in (False, True) if writer.fresh and not args.quick else (True,):
                for exchange in (True, False) if writer.is_folder and not args.quick else (True,):
                    series = kill_everywhere(writer, scene, over=over, exchange=exchange)
                    done.append(series)
                    if not args.json:
                        print(series, flush=True)
    if args.json:
        print(json.dumps([vars(series) for series in done]))
    else:
        print(f"{sum(s.kills for s in done)} kills: each left the older output or the new one, whole, and nothing else")


if __name__ == "__main__":
    main()
