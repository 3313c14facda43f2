"""Reading and pruning a quantized model against the dense one it is: CPU seconds, wall and peak memory.

    python tools/bench_quantized.py              # 16 layers of width 1024, 222 million parameters; minutes

Each measurement is a process of its own, of one thread; ratios are within this run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_memory import Child, in_child

READ = """
import sys
from sparsify.frontend.source import open_source
weights = open_source(sys.argv[1]).weights
if sys.argv[2] == "all":
    for name in weights.parameters():
        weights.read(name)
"""
# This process stays small: what a child of it uses at most is never said to be less than what its parent did.
MAKE = """
import os, sys
from pathlib import Path
sys.path[:0] = [str(Path(sys.argv[1]).parent), str(Path(sys.argv[1]).parents[1] / "tests")]
from safetensors.torch import load_file
from bench_prune import processor
from make_checkpoint import make_checkpoint
from support.quantized import block_fp8, gptq, store
print(f"{processor()}, {os.cpu_count()} cores; one thread", flush=True)
for name, quantized in (("dense", None), ("fp8", lambda folder: block_fp8(folder, 128)), ("gptq", gptq)):
    folder = Path(sys.argv[2]) / name
    make_checkpoint(folder, "1k", layers=int(sys.argv[3]))
    (held,) = folder.glob("*.safetensors")
    store(folder, load_file(held))
    held.unlink()
    (folder / "model.safetensors.index.json").unlink()
    if quantized is not None:
        quantized(folder)
"""
NAMES = {"dense": "bfloat16", "fp8": "fp8 in blocks of 128", "gptq": "GPTQ int4"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=16)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([sys.executable, "-c", MAKE, __file__, scratch, str(args.layers)], check=True)
        print("| weights | file, MB | read all, CPU s | prune, CPU s (wall) | peak, MiB | to open it, MiB |")
        print("| --- | --- | --- | --- | --- | --- |")
        for name, said in NAMES.items():
            folder = Path(scratch, name)
            opened, read = (_child("-c", READ, str(folder), which) for which in ("none", "all"))
            compile_ = ("-m", "sparsify", "compile", str(folder), "--pass", "magnitude:2:4", "--overwrite", "-o")
            pruned = _child(*compile_, str(Path(scratch, "out")))
            size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
            reading = max(0.0, read.cpu - opened.cpu)
            print(
                f"| {said} | {size / 1e6:.0f} | {reading:.1f} | {pruned.cpu:.1f} ({pruned.wall:.1f}) "
                f"| {pruned.peak / 2**20:.0f} | {opened.peak / 2**20:.0f} |",
                flush=True,
            )


def _child(*words: str) -> Child:
    return in_child([sys.executable, *words], {"OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main()
