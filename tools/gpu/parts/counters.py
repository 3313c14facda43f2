"""What only NVIDIA's tools see: bytes a second of the decode kernels (ncu), and bad accesses and races on the smallest
shapes (compute-sanitizer)."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from machine import Found, Machine, Step
from results import Results

from parts.checks import broken_families, check_variant, every_variant
from sparsify.runtime.cuda.autotune.times import random_24
from sparsify.runtime.cuda.fragments import to_fragments
from sparsify.runtime.cuda.products import run_kernel

# Tool to the seconds that it may take.
_SANITIZERS = {"memcheck": 90, "racecheck": 90}
_METRICS = "gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_read.sum.per_second"
# What `--run counters` does inside such a tool: one of "products", "smallest".
INSIDE = "SPARSIFY_GPU_INSIDE"


def steps(machine: Machine, results: Results) -> list[Step]:
    broken = broken_families(results)
    if (inside := os.environ.get(INSIDE)) is not None:
        {"products": products, "smallest": smallest}[inside](machine, broken)
        return []
    return [
        ("ncu", partial(profile, results)),
        *((tool, partial(sanitize, results, tool)) for tool in _SANITIZERS),
    ]


def few_token_kernels(machine: Machine, broken: set[str]) -> list[str]:
    """Plain ones, one of a kind and size."""
    return [v.name for v in every_variant(machine, broken) if v.splits == 1 and not v.early and v.kind != "tiled"]


def products(machine: Machine, broken: set[str]) -> None:
    """Each kernel for few tokens once, on the largest product of LLaMA-7B."""
    rows, columns = 22016, 4096
    fragments = to_fragments(random_24(rows, columns, torch.bfloat16, machine.device))
    for name in few_token_kernels(machine, broken):
        x = torch.randn(8 if name.endswith("m1") else 16, columns, device=machine.device).bfloat16()
        run_kernel(name, x, fragments, None, None, rows)
    machine.synchronize()


def smallest(machine: Machine, broken: set[str]) -> None:
    """Every kernel on small ragged shapes."""
    for variant in every_variant(machine, broken):
        for shape in ((7, 72), (100, 1096)):
            check_variant(machine, variant, shape, (1, 9, 33), (torch.bfloat16,))
    machine.synchronize()


def _inside(results: Results, what: str, tool: list[str], limit: int) -> subprocess.CompletedProcess[str]:
    if shutil.which(tool[0]) is None:
        raise FileNotFoundError(f"{tool[0]} is not on this machine's PATH")
    main = Path(__file__).parents[1] / "main.py"
    command = [*tool, sys.executable, str(main), "--run", "counters", "--work", str(results.kept.parent)]
    environment = os.environ | {INSIDE: what}
    if what == "smallest":
        # Each tensor an allocation of its own, so that an access past its end is one that memcheck sees.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    # `timeout` ends the whole group of processes, and what they said until then is kept.
    command = ["timeout", "--kill-after=5", str(limit), *command]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def profile(results: Results) -> Found:
    tool = ["ncu", "--clock-control", "none", "--metrics", _METRICS, "--csv", "--print-units", "base",
            "--kernel-name", "regex:^(decode|bulk)_"]  # fmt: skip
    done = _inside(results, "products", tool, 120)
    (results.out / "ncu.csv").write_text(done.stdout + done.stderr, encoding="utf-8")
    # What the program prints comes before the table.
    lines = done.stdout.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise RuntimeError(f"ncu gave no table: {(done.stderr or done.stdout).strip()[-300:]}")
    found: dict[str, dict[str, float]] = {}
    for row in csv.DictReader(lines[start:]):
        try:
            value = float((row.get("Metric Value") or "").replace(",", ""))
        except ValueError:
            continue
        found.setdefault(str(row.get("Kernel Name")), {})[str(row.get("Metric Name"))] = value
    return {"kernels": found}


def sanitize(results: Results, name: str) -> Found:
    done = _inside(results, "smallest", ["compute-sanitizer", "--tool", name], _SANITIZERS[name])
    text = done.stdout + done.stderr
    (results.out / f"{name}.txt").write_text(text, encoding="utf-8")
    summary = next((line for line in reversed(text.splitlines()) if "SUMMARY" in line), "no summary")
    if not re.search(r"SUMMARY: 0 (errors|hazards)", summary):
        raise RuntimeError(summary)
    return {"summary": summary.strip("= ")}
