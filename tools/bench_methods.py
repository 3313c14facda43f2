"""Perplexity and time of every method on the bundled model, as Markdown tables.

    python tools/bench_methods.py [seeds] [samples] [stories]

``seeds``: patterns 50%, 60%, 4:8, 2:4, calibration sequences drawn with three seeds, mean and deviation. ``samples``:
50% and 2:4 with 1, 8, 32 and 128 sequences (the Wanda paper's figure 2). Sequences are 256 tokens of the standard
library; evaluated are 64 windows of 256 tokens of its held-out half. Seconds are those of pruning alone, tracing apart.
``stories``: every variant on stories260k, where ``--stories`` holds it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from bench_prune import processor
from bench_quality import tokens

import sparsify
from sparsify.context import Progress
from sparsify.data.batches import evaluation_windows, load_calibration
from sparsify.data.sources import Documents
from sparsify.data.windows import random_windows
from sparsify.frontend.source import Source, open_source
from sparsify.quality.perplexity import perplexity
from sparsify.words import Schedule

METHODS = ("magnitude", "wanda", "gblm", "sparsegpt", "apt", "alps", "twin")
LENGTH = 256


class Bench:
    def __init__(self) -> None:
        self.source = open_source(Path(__file__).parents[1] / "models" / "pycode-6m")
        self.windows, _ = evaluation_windows("python-stdlib", self.source, LENGTH, 64)

    def run(self, spec: str, samples: int, seed: int) -> tuple[float, float]:
        """Perplexity and seconds."""
        rows = 1 if spec.startswith("gblm") else None
        data = load_calibration(
            "python-stdlib", self.source, samples=samples, sequence_length=LENGTH, seed=seed, rows=rows
        )
        assert self.source.folder is not None
        began = 0.0

        def started(progress: Progress) -> None:
            nonlocal began
            if progress.phase not in ("loading", "tracing"):
                began = began or time.perf_counter()

        result = sparsify.compile(self.source.folder, [spec], calibration=data, observe=started)
        seconds = time.perf_counter() - began
        pruned = Source("pruned", self.source.module, result.program.weights)
        return perplexity(pruned, self.windows), seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=["seeds", "samples"])
    parser.add_argument("--stories", type=Path, default=Path(__file__).parents[2] / "shared")
    args = parser.parse_args()
    bench = Bench()
    dense = perplexity(bench.source, bench.windows)
    print(f"{processor()}, torch {torch.__version__}; dense {dense:.2f}\n")
    if "seeds" in args.parts:
        seeds(bench)
    if "samples" in args.parts:
        counts(bench)
    if "stories" in args.parts:
        stories(args.stories)


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


STORIES = (
    "magnitude:P", "wanda:P", "gblm:P", "gblm:P,reduction=mean", "sparsegpt:P", "wanda:P,update=iterative",
    "wanda:P,update=exact", "sparsegpt:P,compensation=exact", "apt:P", "alps:P", "wanda:P,update=exact,target=dense",
    "twin:P,mask=sparsegpt", "twin:P,mask=wanda", "twin:P", "twin:P,blend=1",
)  # fmt: skip
SPREAD = ("wanda:60%", "wanda:60%,allocation=owl", "wanda:60%,allocation=error", "twin:60%", "twin:60%,allocation=owl",
          "twin:60%,allocation=error", "gradient:50%", "gradient:50%,metric=platon", "activation:25%")  # fmt: skip


def stories(shared: Path) -> None:
    """The same protocol as tools/bench_quality.py's, on stories260k."""
    source = open_source(shared / "models" / "stories260k")
    folder = source.folder
    assert folder is not None
    stream = Documents("stories", [tokens(source, shared / "data" / "stories" / "calibration.txt")])
    ids = random_windows(stream, lambda text, special=True: torch.empty(0), 64, LENGTH, 0)
    held = tokens(source, shared / "data" / "stories" / "heldout.txt")
    windows = held[: len(held) // LENGTH * LENGTH].view(-1, LENGTH)

    def run(spec: str, schedule: Schedule = "layer") -> str:
        result = sparsify.compile(folder, [spec], calibration=[ids], schedule=schedule)
        return f"{perplexity(Source('pruned', source.module, result.program.weights), windows):.2f}"

    print(f"stories260k, dense {perplexity(source, windows):.2f}\n\n| | 50% | 2:4 |\n|---|---|---|")
    for text in STORIES:
        cells = [run(text.replace("P", pattern)) for pattern in ("50%", "2:4")]
        print(f"| {text.replace(':P', '')} | " + " | ".join(cells) + " |", flush=True)
    print(f"| twin, block schedule | {run('twin:50%', 'block')} | {run('twin:2:4', 'block')} |\n\n| | |\n|---|---|")
    for text in SPREAD:
        print(f"| {text} | {run(text)} |", flush=True)


if __name__ == "__main__":
    main()
