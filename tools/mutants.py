"""Plant faults in the code, one at a time, and see whether the quick tests notice: ``make mutants``.

The faults are cosmic-ray's (operators, comparisons, numbers, conditions, loops, decorators); which modules and which
tests is tools/mutants/areas.py. Of each area some places are drawn, the same ones for the same seed, and one fault at
each. What no test sees is printed as a difference; docs/mutants.md explains those that are known. A copy of the tree is
mutated, under build/mutants.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools" / "mutants"))

from areas import AREAS, Area  # noqa: E402

WORK = ROOT / "build" / "mutants"
TREE, WARM, SOCKET = WORK / "tree", ROOT / "tools" / "mutants" / "warm.py", WORK / "warm"
# Seconds; a mutant that loops is caught by them.
LONGEST = 120


def copy_tree() -> None:
    """The package as a plain install has it, with its tests: the working tree stays as it is."""
    shutil.rmtree(WORK, ignore_errors=True)
    TREE.mkdir(parents=True)
    unwanted = shutil.ignore_patterns("__pycache__", "*.so")
    for source, target in (
        ("sparsify", "sparsify"), ("passes", "sparsify/passes"), ("backends", "sparsify/backends"), ("tests", "tests"),
        ("tools", "tools"), ("docs", "docs"),
    ):  # fmt: skip
        shutil.copytree(ROOT / source, TREE / target, ignore=unwanted)
    shutil.copy(ROOT / "pyproject.toml", TREE)
    (TREE / "models").symlink_to(ROOT / "models")


def environment() -> dict[str, str]:
    # Bytecode is told apart by size and second alone: a mutant could run as the one before.
    return {**os.environ, "PYTHONPATH": f"{TREE}:{os.environ.get('PYTHONPATH', '')}", "PYTHONDONTWRITEBYTECODE": "1"}


def cosmic_ray(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "cosmic_ray.cli", *words], cwd=TREE, env=environment(), check=True)


def pytest_words(area: Area) -> list[str]:
    quick = ["-x", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-W", "ignore", "-m", "not slow"]
    return [sys.executable, str(WARM), "run", str(SOCKET), *quick, *area.tests]


def begin(name: str, area: Area) -> Path:
    """A session of cosmic-ray with every fault of an area."""
    quoted = " ".join(json.dumps(word) if " " in word else word for word in pytest_words(area))
    config = WORK / f"{name}.toml"
    config.write_text(
        f"[cosmic-ray]\nmodule-path = {json.dumps(list(area.modules))}\ntimeout = {LONGEST}\nexcluded-modules = []\n"
        f"test-command = {json.dumps(quoted)}\n[cosmic-ray.distributor]\nname = 'local'\n"
    )
    session = WORK / f"{name}.sqlite"
    cosmic_ray("init", str(config), str(session))
    return session


def unread(path: Path) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """From where to where a file holds annotations, which are not evaluated: a fault in them is none."""
    found: list[ast.expr] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            found += [node.returns] if node.returns is not None else []
        elif isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            found.append(node.annotation)
    return [((n.lineno, n.col_offset), (n.end_lineno or 0, n.end_col_offset or 0)) for n in found]


def draw(session: Path, each: int, seed: int) -> int:
    """Leave ``each`` faults of a session to be tried, at places drawn by ``seed``; how many there were in all."""
    from cosmic_ray.work_db import WorkDB, use_db
    from cosmic_ray.work_item import WorkerOutcome, WorkResult

    chance = random.Random(seed)
    annotations: dict[Path, Any] = {}
    with use_db(session, WorkDB.Mode.open) as db:
        places: dict[tuple[str, tuple[int, int]], list[str]] = {}
        items = sorted(db.work_items, key=lambda item: str(item.mutations))
        for item in items:
            (fault,) = item.mutations
            spans = annotations.setdefault(fault.module_path, unread(TREE / fault.module_path))
            if not any(start <= fault.start_pos < end for start, end in spans):
                places.setdefault((str(fault.module_path), fault.start_pos), []).append(item.job_id)
        drawn = chance.sample(sorted(places), min(each, len(places)))
        chosen = {chance.choice(places[place]) for place in drawn}
        for item in items:
            if item.job_id not in chosen:
                db.set_result(item.job_id, WorkResult(worker_outcome=WorkerOutcome.SKIPPED))
        return sum(len(jobs) for jobs in places.values())


def tell(name: str, session: Path, total: int) -> tuple[int, int]:
    """Print what survived; how many faults were tried, and how many of them seen."""
    from cosmic_ray.work_db import WorkDB, use_db
    from cosmic_ray.work_item import TestOutcome, WorkerOutcome

    with use_db(session, WorkDB.Mode.open) as db:
        tried = [(job, result) for job, result in db.results if result.worker_outcome != WorkerOutcome.SKIPPED]
        left = [(job, result) for job, result in tried if result.test_outcome == TestOutcome.SURVIVED]
        where = {item.job_id: item.mutations[0] for item in db.work_items}
    print(f"{name}: {len(tried) - len(left)} of {len(tried)} seen (of {total} faults)", flush=True)
    for job, result in left:
        fault = where[job]
        lines = [n for n in (result.diff or "").splitlines() if n[:1] in "+-" and n[:3] not in ("+++", "---")]
        print(f"  {fault.module_path}:{fault.start_pos[0]} {fault.operator_name.removeprefix('core/')}")
        print("\n".join(f"    {line}" for line in lines), flush=True)
    return len(tried), len(tried) - len(left)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("areas", nargs="*", metavar="AREA", help=f"of {', '.join(AREAS)}; all where none is named")
    parser.add_argument("--each", type=int, default=20, help="faults tried in each area")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--least", type=float, default=0.85, help="the share that must be seen")
    options = parser.parse_args()
    if unknown := set(options.areas) - AREAS.keys():
        parser.error(f"no area {', '.join(sorted(unknown))}")
    copy_tree()
    server = subprocess.Popen([sys.executable, str(WARM), "serve", str(SOCKET)], cwd=TREE, env=environment())
    tried = seen = 0
    try:
        while not SOCKET.exists() and server.poll() is None:
            time.sleep(0.5)
        for name in options.areas or AREAS:
            begun = time.monotonic()
            done = subprocess.run(
                pytest_words(AREAS[name]), cwd=TREE, env=environment(), capture_output=True, text=True
            )
            if done.returncode:
                print(f"{name}: its tests fail without a fault\n{done.stdout[-2000:]}")
                return 1
            print(f"{name}: {time.monotonic() - begun:.0f} s for its tests", flush=True)
            session = begin(name, AREAS[name])
            total = draw(session, options.each, options.seed)
            cosmic_ray("exec", str(WORK / f"{name}.toml"), str(session))
            one, other = tell(name, session, total)
            tried, seen = tried + one, seen + other
    finally:
        server.terminate()
        server.wait()
    print(f"{seen} of {tried} faults seen ({seen / max(1, tried):.0%})")
    return 0 if seen >= options.least * tried else 1


if __name__ == "__main__":
    sys.exit(main())
