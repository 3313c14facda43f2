"""Two processes of one thread against one process of one thread: whole compiles of a seeded random Llama.

    python tools/bench_processes.py [--passes wanda:2:4 sparsegpt:2:4] [--layers 8] [--samples 32] [--repeat 3]

Prints seconds of the pass (calibration and pruning), seconds and CPU seconds of the whole
command, and the bytes that processes sent, of the median run; ratios are taken within one run, taken in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HIDDEN, INTERMEDIATE, VOCABULARY, HEADS = 1024, 2816, 8192, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", nargs="+", default=["wanda:2:4", "sparsegpt:2:4"])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    asked = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        make(model, asked.layers, asked.dtype)
        for spec in asked.passes:
            runs: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
            for number in range(asked.repeat):
                for count in (1, 2):
                    out = Path(folder) / f"{asked.passes.index(spec)}-{count}-{number}"
                    runs[count].append(run(model, spec, count, out, asked.samples, asked.length))
            said = {count: sorted(of, key=lambda one: one["pass"])[len(of) // 2] for count, of in runs.items()}
            for count, one in said.items():
                print(
                    f"{spec}, {count} processes: pass {one['pass']:.1f} s, whole {one['whole']:.1f} s, "
                    f"CPU {one['cpu']:.1f} s, sent {one['sent'] / 1e6:.1f} MB"
                )
            ratios = {
                what: statistics.median(two[what] / one[what] for one, two in zip(runs[1], runs[2], strict=True))
                for what in ("pass", "whole", "cpu")
            }
            print(f"{spec}: " + ", ".join(f"{what} {ratio:.2f}x" for what, ratio in ratios.items()), flush=True)


def make(folder: Path, layers: int, dtype: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)


def run(model: Path, spec: str, count: int, out: Path, samples: int, length: int) -> dict[str, Any]:
    """One whole command, its children's CPU seconds among it."""
    words = [sys.executable, "-m", "sparsify", "compile", str(model), "--pass", spec, "-o", str(out), "--json"]
    words += ["--calibration", "random", "--samples", str(samples), "--sequence-length", str(length), "--no-journal"]
    words += ["--processes", str(count)] if count > 1 else []
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(words, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE)
    whole, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    told = json.loads((out / "sparsify.json").read_text())
    return {
        "pass": json.loads(done.stdout)["seconds_by_pass"][0],
        "whole": whole,
        "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "sent": told.get("processes", {}).get("bytes", 0),
    }


if __name__ == "__main__":
    main()
