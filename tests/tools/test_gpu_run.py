"""``tools/gpu/run.sh`` on this CPU: what a lent GPU's minutes are spent on has all been run before."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run(folder: Path, *words: str, root: Path = ROOT) -> tuple[int, dict[str, Any], str]:
    """Its exit status, results and report."""
    environment = os.environ | {
        "PYTHON": sys.executable,
        "SPARSIFY_GPU_WORK": str(folder / "work"),
        "OUT": str(folder / "out"),
    }
    script = root / "tools" / "gpu" / "run.sh"
    done = subprocess.run(["bash", script, *words], capture_output=True, text=True, check=False, env=environment)
    assert (folder / "out" / "results.json").exists(), done.stdout + done.stderr
    content: dict[str, Any] = json.loads((folder / "out" / "results.json").read_text())
    return done.returncode, content, (folder / "out" / "report.md").read_text()


def test_the_call_is_short_enough_and_needs_a_gpu() -> None:
    script = (ROOT / "tools" / "gpu" / "run.sh").read_text()
    assert len(script) < 2000
    done = subprocess.run(
        ["bash", ROOT / "tools" / "gpu" / "run.sh", "--only", "last"],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == 2 and "take some of first,checks,shapes,decode,pruning,counters" in done.stderr


@pytest.mark.exhaustive
def test_all_of_it_emulated(tmp_path: Path) -> None:
    code, content, report = run(tmp_path, "--emulate")
    failures = {(p, n): s["failed"] for p, steps in content["parts"].items() for n, s in steps.items() if "failed" in s}
    assert not failures and code == 0
    assert content["emulated"] and report.startswith("**EMULATED")
    ended = {name: steps["part"]["status"] for name, steps in content["parts"].items()}
    assert ended == dict.fromkeys(("first", "checks", "shapes", "decode", "pruning"), "done")
    # A layer is compiled once for each model, and not once for each layer.
    decoded = content["parts"]["decode"]
    assert decoded["compiled layers"]["compilations"] == 2 and decoded["eager layers"]["compilations"] == 0
    assert decoded["compiled layers"]["same_tokens"] == 1.0 and decoded["compiled layers"]["left_dense"] == 0
    assert len(list((tmp_path / "out").iterdir())) <= 8
    assert "| wanda:2:4 layer |" in report and "policy both" in report


# Parts that go wrong, in a copy of the tool: what they do, and what the run says of it.
FAULTY = """
import os, signal, time
from pathlib import Path

def mark(name):
    with Path(os.environ["OUT"], "tries").open("a") as file:
        file.write(name + "\\\\n")

def good():
    mark("good")
    return {"answer": 42}

def bad():
    raise ValueError("this one fails\\\\nwith a second line")

def lost():
    mark("lost")
    raise RuntimeError("an illegal memory access")

def dead():
    os.kill(os.getpid(), signal.SIGSEGV)

def needed():
    raise RuntimeError("does not compile")

def slow():
    time.sleep(600)

def steps(machine, results):
    type(machine).alive = lambda self: "failed" not in results.part("faulty").get("lost", {})  # once lost, never again
    return [(f.__name__, f) for f in STEPS]
"""


def faulty(tmp_path: Path, steps: str, limit: float = 60) -> Path:
    root = tmp_path / "copy"
    for name in ("sparsify", "passes", "backends", "tests"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "tools" / "gpu", root / "tools" / "gpu")
    parts = root / "tools" / "gpu" / "parts"
    lines = [
        f'PARTS = {{"faulty": {limit}, "after": 60}}',
        "BUDGET = 500",
        'NEEDED = {"faulty": ("needed",)}',
        "WITHOUT = ()",
    ]
    (parts / "__init__.py").write_text("\n".join(lines) + "\n")
    source = FAULTY.replace("\\\\n", "\\n")
    (parts / "faulty.py").write_text(f"{source}\nSTEPS = [{steps}]\n")
    (parts / "after.py").write_text(f"{source}\nSTEPS = [good]\n")
    return root


@pytest.mark.slow
def test_steps_that_fail_kill_or_lose_the_gpu_cost_themselves_alone(tmp_path: Path) -> None:
    code, content, report = run(tmp_path, "--emulate", root=faulty(tmp_path, "good, bad, lost, dead, good"))
    steps = content["parts"]["faulty"]
    assert code == 1 and steps["good"]["answer"] == 42
    assert steps["bad"]["failed"] == "ValueError: this one fails"
    assert "illegal memory access" in steps["lost"]["failed"] and "took the process" in steps["dead"]["failed"]
    assert content["parts"]["after"]["good"]["answer"] == 42
    assert "- faulty, bad: ValueError: this one fails" in report
    # What was tried is not tried again, in whatever process.
    assert (tmp_path / "out" / "tries").read_text().split() == ["good", "lost", "good"]
    assert "Traceback" in (tmp_path / "out" / "log.txt").read_text()


@pytest.mark.exhaustive
def test_a_part_that_hangs_is_stopped_and_the_next_goes_on(tmp_path: Path) -> None:
    root = faulty(tmp_path, "good, slow", limit=20)
    code, content, _ = run(tmp_path, "--emulate", root=root)
    assert code == 1 and content["parts"]["faulty"]["part"]["status"].startswith("stopped")
    assert (
        content["parts"]["faulty"]["good"]["answer"] == 42 and "used up" in content["parts"]["faulty"]["slow"]["failed"]
    )
    assert content["parts"]["after"]["part"]["status"] == "done"
    # From a later part on, with what an earlier run found.
    _, again, _ = run(tmp_path, "--emulate", "--from", "after", root=root)
    assert again["parts"]["faulty"] == content["parts"]["faulty"]
    _, spent, _ = run(tmp_path, "--emulate", "--budget", "1", root=root)
    assert {s["part"]["status"] for s in spent["parts"].values()} == {"not run: the time is used up"}


def test_what_leans_on_a_part_that_failed_is_not_run(tmp_path: Path) -> None:
    code, content, report = run(tmp_path, "--emulate", root=faulty(tmp_path, "needed, good"))
    assert code == 1 and content["parts"]["faulty"]["good"]["answer"] == 42
    assert content["parts"]["after"]["part"]["status"].startswith("not run: faulty, needed, failed")
    assert "does not compile" in report


def test_a_report_of_half_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes that were measured in part, a count at which nothing but cuBLAS ran, and one at which that did not."""
    monkeypatch.syspath_prepend(ROOT / "tools" / "gpu")
    from report import BLOCKS, report

    steps: dict[str, Any] = {
        f"{shape}, {tokens} tokens": {"micro": {tokens: {"dense": 10.0, "unpack": 8.0}}}
        for shape in BLOCKS["LLaMA-7B"]
        for tokens in ("1", "16")
    }
    steps["4096x4096, 16 tokens"] = {"micro": {"16": {"dense": 10.0}}}
    steps["4096x14336, 1 tokens"] = {"micro": {"1": {"unpack": 10.0}}}
    steps["1024x4096, 16 tokens"] = {"failed": "RuntimeError: an illegal memory access"}
    lines = list(report({"emulated": False, "parts": {"shapes": steps}}))
    assert "| **LLaMA-7B, a block** | **1.25** | – |" in lines
    assert "| **Llama-3-8B, a block** | – | – |" in lines
    assert "- shapes, 1024x4096, 16 tokens: RuntimeError: an illegal memory access" in lines
