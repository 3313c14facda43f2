"""Peak memory of reading data: 1 MB of it against 1 GB, as text and as .jsonl, drawn from and evaluated on.

    python tools/bench_text.py                  # 1 MB and 1 GB: some 2 GB of disk, about a minute
    python tools/bench_text.py --large 64 --whole  # 64 MB, and evaluation without a limit too

Each measurement is a process of its own; peak resident memory is the kernel's (ru_maxrss). Seconds are those of
reading, drawing and tokenising alone, with the CPU's beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from bench_prune import processor

MODEL = Path(__file__).parents[1] / "models" / "pycode-6m"
MEASURE = """
import resource, sys, time
from sparsify.data.batches import evaluation_windows, load_calibration
from sparsify.frontend.source import open_source
model, data, kind = sys.argv[1:]
source = open_source(model)
source.tokenizer()
wall, cpu = time.perf_counter(), time.process_time()
if kind == "draw":
    found = load_calibration(data, source, samples=128, sequence_length=256).size
else:
    windows, _ = evaluation_windows(data, source, 256, 96 if kind == "limit" else None)
    found = f"{len(windows)} windows"
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(f"{peak} {wall:.2f} {cpu:.2f} {found}")
"""
KINDS = {"draw": "128×256 drawn", "limit": "96 windows of 256", "whole": "all windows of 256"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--large", type=int, default=1000, help="megabytes of the large files")
    parser.add_argument("--whole", action="store_true", help="evaluate without a limit too, which tokenises everything")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    print(f"{processor()}, {os.cpu_count()} cores\n")
    print(f"| data | what | 1 MB | {args.large} MB | more | wall | CPU |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        for suffix in ("txt", "jsonl"):
            small, large = (Path(scratch) / f"{size}.{suffix}" for size in (1, args.large))
            write(small, 1)
            write(large, args.large)
            for kind in ("draw", "limit", "whole")[: 3 if args.whole else 2]:
                few, many = measure(small, kind), measure(large, kind)
                more = (many[0] - few[0]) / 2**20
                peaks = " | ".join(f"{peak / 2**20:.0f} MiB" for peak in (few[0], many[0]))
                print(f"| .{suffix} | {KINDS[kind]} | {peaks} | {more:+.0f} MiB | {many[1]:.1f} s | {many[2]:.1f} s |")
            large.unlink()


def write(path: Path, megabytes: int) -> None:
    """The standard library's source files, over and over; in a .jsonl file a document each."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = [file.read_text(encoding="utf-8", errors="ignore") for file in sorted(root.glob("*.py"))]
    turn = "\n".join(texts) if path.suffix == ".txt" else "".join(json.dumps({"text": t}) + "\n" for t in texts if t)
    block, left = turn.encode(), megabytes * 1_000_000
    with path.open("wb") as file:
        while left > len(block):
            left -= file.write(block)
        file.write(block[:left] if path.suffix == ".txt" else block[: block.rfind(b"\n", 0, left) + 1])


def measure(data: Path, kind: str) -> tuple[int, float, float]:
    """Peak bytes, wall and CPU seconds of a child."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", MEASURE, str(MODEL), str(data), kind], capture_output=True, text=True, check=True
    )
    peak, wall, cpu, *_ = done.stdout.split()
    return int(peak), float(wall), float(cpu)


if __name__ == "__main__":
    main()
