"""The parts of a GPU run in order, each a process of its own under a time-out: ``bash tools/gpu/run.sh``.

A part is a list of steps. A step that fails is recorded with its reason and the next goes on; one that takes the GPU's
context with it (an illegal access) ends the process, and the part is started again behind it.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from importlib import import_module
from pathlib import Path
from typing import IO

from parts import BUDGET, NEEDED, PARTS, WITHOUT
from report import write_report
from results import FAILED, LOST, Results

_MOST_STARTS = 12


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="first", choices=PARTS, help="go on with this part after an earlier run")
    parser.add_argument("--only", default="", help=f"of {','.join(PARTS)}; the results of the others stay")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds in all")
    parser.add_argument("--emulate", action="store_true", help="on a CPU, at tiny shapes, by a clock that is made up")
    parser.add_argument("--work", type=Path, default=Path("/tmp/sparsify-gpu"))
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    # NVIDIA's own tools see nothing of an emulator.
    names = [name for name in PARTS if name != "counters" or not options.emulate]
    if options.only:
        known, names = names, options.only.split(",")
        if unknown := [name for name in names if name not in known]:
            parser.error(f"--only {','.join(unknown)}: take some of {','.join(known)}")
    if options.first:
        names = [name for name in names if [*PARTS].index(name) >= [*PARTS].index(options.first)]
    out = Path(os.environ.get("OUT") or options.work / "out")
    results = Results(out, options.work / f"results{'-emulated' * options.emulate}.json")
    if options.run:
        return run_part(options.run, results, options.emulate)
    results.begin(options.emulate, resumed=bool(options.first or options.only))
    return run_all(names, results, options.budget, options.emulate)


def run_part(name: str, results: Results, emulate: bool) -> int:
    """In this process. The exit status: 0, or LOST."""
    # What is left out of a race is said by a warning: once a kernel is enough.
    warnings.simplefilter("default", RuntimeWarning)
    from machine import Machine, run_steps

    if emulate:
        from emulation import emulated

        machine = emulated()
    else:
        machine = Machine.here()
    steps = import_module(f"parts.{name}").steps(machine, results)
    return run_steps(name, steps, machine, results)


def run_all(names: list[str], results: Results, budget: float, emulate: bool) -> int:
    """Each in a process of its own. The exit status: 1 where anything failed."""
    began, statuses = time.monotonic(), list[str]()
    for name in names:
        needed = [(part, step) for part, steps in NEEDED.items() for step in steps]
        broken = [f"{part}, {step}," for part, step in needed if FAILED in results.part(part).get(step, {})]
        results.forget(name)
        start, end = time.monotonic(), min(began + budget, time.monotonic() + PARTS[name])
        if broken and name not in NEEDED and name not in WITHOUT:
            status = f"not run: {broken[0]} failed, and this leans on it"
        elif end - start < 5:
            status = "not run: the time is used up"
        else:
            status = _supervise(name, results, end, emulate)
        results.record(name, "part", {"status": status, "seconds": round(time.monotonic() - start, 1)})
        print(f"== {name}: {status}, {time.monotonic() - start:.0f} s", flush=True)
        statuses.append(status)
        try:
            write_report(results)
        except Exception:
            # The parts that follow are worth more than the page: results.json has what it is made of.
            traceback.print_exc()
            statuses.append("no report")
    page = results.out / "report.md"
    print(page.read_text(encoding="utf-8") if page.exists() else "no report: see results.json")
    failed = [s for name in names for s in results.part(name).values() if FAILED in s]
    return int(bool(failed) or any(s != "done" for s in statuses))


def _supervise(name: str, results: Results, end: float, emulate: bool) -> str:
    """Until it is done or its time is: a sentence for the report."""
    command = [sys.executable, __file__, "--run", name, "--work", str(results.kept.parent)]
    command += ["--emulate"] if emulate else []
    for start in range(_MOST_STARTS):
        print(f"== {name}{f', start {start + 1}' if start else ''}", flush=True)
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        assert process.stdout is not None, "asked for above"
        reader = threading.Thread(target=_pass_on, args=(process.stdout, results.out / "log.txt"), daemon=True)
        reader.start()
        try:
            code = process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return "stopped: its time was used up"
        reader.join(5)
        if code == 0:
            return "done"
        # A signal (a negative code) ends one step as a lost context does: those behind it may still tell something.
        if code not in (LOST, *range(-64, 0)):
            return f"ended with {code}: see log.txt"
    return f"started {_MOST_STARTS} times, and lost the GPU or died each time"


def _pass_on(stream: IO[str], log: Path) -> None:
    """What a part prints, to the log whole and to the terminal."""
    with log.open("a", encoding="utf-8") as file:
        for line in stream:
            file.write(line)
            file.flush()
            print(line, end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
