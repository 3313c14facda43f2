"""Peak memory of pruning: against depth, of a large checkpoint, and of tracing a 70B model; and what refine costs.

    python tools/bench_memory.py                 # 8 against 32 layers, and the 70B trace
    python tools/bench_memory.py --only refine   # refine alone, and how many forwards of the model it takes
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

# One forward of the whole model over so many random tokens.
FORWARD = """
import sys, time, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
samples = [torch.randint(1024, (1, int(sys.argv[3]))) for _ in range(int(sys.argv[2]))]
with torch.no_grad():
    model(samples[0])
    began = time.process_time()
    for ids in samples:
        model(ids)
print(time.process_time() - began)
"""
# Sequences and tokens of each that refine learns from.
SAMPLES, LENGTH = 32, 256


@dataclass(frozen=True)
class Child:
    """Seconds of the processor and of the clock, peak resident bytes (``ru_maxrss``), and what was printed.

    The peak is never said to be less than what the parent had used when it began the child.
    """

    cpu: float
    wall: float
    peak: int
    said: str


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--large", type=Path)
    parser.add_argument("--only", choices=["refine"])
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    print(f"{processor()}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        if args.only != "refine":
            others(Path(scratch), args.large)
        refine(Path(scratch))


def others(scratch: Path, big: Path | None) -> None:
    depth(scratch, "wanda:2:4", "8GiB")
    # Gradients and activations past the budget lie in a file.
    depth(scratch, "gblm:2:4", "100MiB")
    trace(scratch)
    if big:
        large(big, scratch)


def depth(scratch: Path, spec: str, memory: str) -> None:
    """Peak memory of a whole command with 8 and with 32 layers of the same width."""
    peaks = {}
    for layers in (8, 32):
        folder = scratch / f"layers-{layers}"
        make_checkpoint(folder, "1k", layers=layers)
        child = compile_in_child(folder, scratch / "out", spec, "--memory", memory, samples=8, length=256)
        peaks[layers] = child.peak
        print(f"{spec} --memory {memory}, {layers:3} layers: peak {child.peak / 2**20:.0f} MiB, {child.wall:.0f} s")
        shutil.rmtree(folder)
    print(f"32 against 8 layers: {peaks[32] / peaks[8]:.3f}×")


def refine(scratch: Path) -> None:
    """Peak memory of ``wanda:2:4`` and ``refine`` with 8 and with 32 layers, and refine's CPU seconds in forwards."""
    peaks = {}
    for layers in (8, 32):
        folder = scratch / f"refined-{layers}"
        make_checkpoint(folder, "small", layers=layers)
        runs = [
            compile_in_child(folder, scratch / "out", "wanda:2:4", *more, samples=SAMPLES, length=LENGTH)
            for more in ((), ("--pass", "refine"))
        ]
        forward = float(in_child([sys.executable, "-c", FORWARD, str(folder), str(SAMPLES), str(LENGTH)]).said)
        peaks[layers] = runs[1].peak
        cost = runs[1].cpu - runs[0].cpu
        before, after = (child.peak / 2**20 for child in runs)
        print(
            f"wanda:2:4 and refine, {SAMPLES}×{LENGTH} tokens, {layers:3} layers: peak {after:.0f} MiB, {before:.0f} "
            f"without refine; refine takes {cost:.0f} CPU s, {cost / forward:.0f} forwards of {forward:.2f}"
        )
        shutil.rmtree(folder)
    print(f"32 against 8 layers: {peaks[32] / peaks[8]:.3f}×")


def trace(scratch: Path) -> None:
    folder = scratch / "config-70b"
    write_config(folder, "70b")
    child = in_child([sys.executable, "-c", TRACE, str(folder)])
    print(
        f"trace of Llama-70B from its config: {child.said.strip().splitlines()[-1]}, peak {child.peak / 2**20:.0f} MiB"
    )


def large(folder: Path, scratch: Path) -> None:
    if not folder.exists():
        print(f"{folder}: {make_checkpoint(folder, '13b') / 1e9:.1f} GB made")
    child = compile_in_child(folder, folder.parent / f"{folder.name}-pruned", "wanda:2:4", samples=2, length=128)
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    print(f"{folder.name} ({size / 1e9:.1f} GB), 2×128 tokens: peak {child.peak / 2**30:.2f} GiB, {child.wall:.0f} s")


def compile_in_child(folder: Path, out: Path, spec: str, *more: str, samples: int, length: int) -> Child:
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


def in_child(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Child:
    """Run ``command``, with ``environment`` beside this process's own.

    Raises:
        SystemExit: it failed.
    """
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(command, stdout=said, env=os.environ | dict(environment or {}))
        _, status, used = os.wait4(child.pid, 0)
        wall = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read()
    if child.returncode:
        raise SystemExit(f"{list(command)} failed with {child.returncode}")
    return Child(used.ru_utime + used.ru_stime, wall, used.ru_maxrss * 1024, text)


if __name__ == "__main__":
    main()
