"""Peak memory of pruning: against depth, of a large checkpoint, and of tracing a 70B model.

    python tools/bench_memory.py                 # 8 against 32 layers, and the 70B trace
    python tools/bench_memory.py --large FOLDER  # a large checkpoint too; made by tools/make_checkpoint.py if missing

Each measurement is a process of its own; peak resident memory is the kernel's (ru_maxrss).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_prune import processor
from make_checkpoint import make_checkpoint, write_config

TRACE = """
import sys, time
from sparsify.data.batches import example_batch
from sparsify.frontend.capture import capture
from sparsify.frontend.source import Source, build_skeleton
from sparsify.frontend.matching import weights_of_module
from pathlib import Path
model = build_skeleton(Path(sys.argv[1]))
began = time.perf_counter()
source = Source("70b", model, weights_of_module(model))
program = capture(source, example_batch(source, 1, 2048))
print(f"{len(program.nodes)} nodes in {time.perf_counter() - began:.1f} s")
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--large", type=Path)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    print(f"{processor()}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        depth(Path(scratch), "wanda:2:4", "8GiB")
        # Gradients and activations past the budget lie in a file.
        depth(Path(scratch), "gblm:2:4", "100MiB")
        trace(Path(scratch))
        if args.large:
            large(args.large, Path(scratch))


def depth(scratch: Path, spec: str, memory: str) -> None:
    """Peak memory of a whole command with 8 and with 32 layers of the same width."""
    peaks = {}
    for layers in (8, 32):
        folder = scratch / f"layers-{layers}"
        make_checkpoint(folder, "1k", layers=layers)
        peaks[layers], seconds, _ = compile_in_child(
            folder, scratch / "out", spec, "--memory", memory, samples=8, length=256
        )
        print(f"{spec} --memory {memory}, {layers:3} layers: peak {peaks[layers] / 2**20:.0f} MiB, {seconds:.0f} s")
        shutil.rmtree(folder)
    print(f"32 against 8 layers: {peaks[32] / peaks[8]:.3f}×")


def trace(scratch: Path) -> None:
    folder = scratch / "config-70b"
    write_config(folder, "70b")
    peak, _, said = in_child([sys.executable, "-c", TRACE, str(folder)])
    print(f"trace of Llama-70B from its config: {said.strip().splitlines()[-1]}, peak {peak / 2**20:.0f} MiB")


def large(folder: Path, scratch: Path) -> None:
    if not folder.exists():
        print(f"{folder}: {make_checkpoint(folder, '13b') / 1e9:.1f} GB made")
    peak, seconds, _ = compile_in_child(
        folder, folder.parent / f"{folder.name}-pruned", "wanda:2:4", samples=2, length=128
    )
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    print(f"{folder.name} ({size / 1e9:.1f} GB), 2×128 tokens: peak {peak / 2**30:.2f} GiB, {seconds:.0f} s")


def compile_in_child(
    folder: Path, out: Path, spec: str, *more: str, samples: int, length: int
) -> tuple[int, float, str]:
    command = [
        sys.executable,
        "-m",
        "sparsify",
        "compile",
        str(folder),
        "--pass",
        spec,
        "--calibration",
        "random",
        "--samples",
        str(samples),
        "--sequence-length",
        str(length),
        "-o",
        str(out),
        "--overwrite",
        *more,
    ]
    result = in_child(command)
    shutil.rmtree(out)
    return result


def in_child(command: list[str]) -> tuple[int, float, str]:
    """Run ``command``; its peak resident bytes, wall seconds and what it printed."""
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(command, stdout=said)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read()
    if child.returncode:
        raise SystemExit(f"{command} failed with {child.returncode}")
    return usage.ru_maxrss * 1024, time.perf_counter() - began, text


if __name__ == "__main__":
    main()
