"""Perplexity and time of every method on the bundled model, as Markdown tables.

    python tools/bench_methods.py [seeds] [samples]

``seeds``: patterns 50%, 60%, 4:8, 2:4, calibration sequences drawn with three seeds, mean and deviation. ``samples``:
50% and 2:4 with 1, 8, 32 and 128 sequences (the Wanda paper's figure 2). Sequences are 256 tokens of the standard
library; evaluated are 64 windows of 256 tokens of its held-out half. Seconds are those of pruning alone, tracing apart.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from bench_prune import processor

import sparsify
from sparsify.calibration.data import evaluation_windows, load_calibration
from sparsify.evaluate import perplexity
from sparsify.source import Source, open_source

METHODS = ("magnitude", "wanda", "gblm", "sparsegpt", "apt", "alps", "twin")
LENGTH = 256


class Bench:
    def __init__(self) -> None:
        self.source = open_source(Path(__file__).parents[1] / "models" / "pycode-6m")
        self.windows, _ = evaluation_windows("python-stdlib", self.source, LENGTH, 64)

    def run(self, spec: str, samples: int, seed: int) -> tuple[float, float]:
        """Perplexity and seconds."""
        one_by_one = spec.startswith("gblm")
        data = load_calibration(
            "python-stdlib", self.source, samples=samples, sequence_length=LENGTH, seed=seed, one_by_one=one_by_one
        )
        assert self.source.folder is not None
        began = 0.0

        def started(progress: object) -> None:
            nonlocal began
            began = began or time.perf_counter()

        result = sparsify.compile(self.source.folder, [spec], calibration=data, observe=started)
        seconds = time.perf_counter() - began
        pruned = Source("pruned", self.source.module, result.program.weights)
        return perplexity(pruned, self.windows), seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=["seeds", "samples"])
    args = parser.parse_args()
    bench = Bench()
    dense = perplexity(bench.source, bench.windows)
    print(f"{processor()}, torch {torch.__version__}; dense {dense:.2f}\n")
    if "seeds" in args.parts:
        seeds(bench)
    if "samples" in args.parts:
        counts(bench)


def seeds(bench: Bench) -> None:
    patterns = ("50%", "60%", "4:8", "2:4")
    print("| 64 sequences, seeds 0 1 2 | " + " | ".join(patterns) + " | seconds, 2:4 |\n|---|---|---|---|---|---|")
    for method in METHODS:
        cells, took = [], 0.0
        for pattern in patterns:
            chosen = (0,) if method == "magnitude" else (0, 1, 2)
            found = [bench.run(f"{method}:{pattern}", 64, seed) for seed in chosen]
            values = [value for value, _ in found]
            deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{deviation}")
            took = min(seconds for _, seconds in found)
        print(f"| {method} | " + " | ".join(cells) + f" | {took:.1f} |", flush=True)
    print()


def counts(bench: Bench) -> None:
    sizes = (1, 8, 32, 128)
    for pattern in ("50%", "2:4"):
        print(
            f"| {pattern}, sequences | " + " | ".join(map(str, sizes)) + " | seconds, 128 |\n|---|---|---|---|---|---|"
        )
        for method in METHODS[1:]:
            found = [bench.run(f"{method}:{pattern}", size, 0) for size in sizes]
            cells = " | ".join(f"{value:.2f}" for value, _ in found)
            print(f"| {method} | {cells} | {found[-1][1]:.1f} |", flush=True)
        print()


if __name__ == "__main__":
    main()
