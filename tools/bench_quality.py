"""Perplexity of dense, magnitude and wanda at several patterns and schedules, as Markdown tables.

    python tools/bench_quality.py [--stories ../shared] [--patterns 50%,4:8,2:4]

The bundled model calibrates on 64×256 tokens of the standard library and is evaluated on 96 windows of 256 of the
held-out half. stories260k, where the folder is at hand, calibrates and is evaluated on its own stories: each story
tokenised with its begin token, joined, 64×256 tokens from calibration.txt, all windows of 256 of heldout.txt.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import torch
from bench_prune import processor
from torch import Tensor

import sparsify
from sparsify.data.batches import evaluation_windows, load_calibration
from sparsify.data.sources import Documents
from sparsify.data.windows import random_windows
from sparsify.evaluation.perplexity import perplexity
from sparsify.frontend.source import Source, open_source

ROOT = Path(__file__).parents[1]
LENGTH = 256


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stories", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--patterns", default="50%,4:8,2:4")
    args = parser.parse_args()
    patterns = args.patterns.split(",")
    print(f"{processor()}, python {platform.python_version()}, torch {torch.__version__}\n")

    source = open_source(ROOT / "models" / "pycode-6m")
    data = load_calibration("python-stdlib", source, samples=64, sequence_length=LENGTH)
    ids = torch.cat([batch["input_ids"] for batch in data.batches])
    windows, _ = evaluation_windows("python-stdlib", source, LENGTH, 96)
    table("pycode-6m", source, ids, windows, patterns)

    folder = args.stories / "models" / "stories260k"
    if folder.exists():
        source = open_source(folder)
        text = args.stories / "data" / "stories"
        stream = Documents("stories", [tokens(source, text / "calibration.txt")])
        ids = random_windows(stream, lambda t, special=True: torch.empty(0), 64, LENGTH, 0)
        held = tokens(source, text / "heldout.txt")
        windows = held[: len(held) // LENGTH * LENGTH].view(-1, LENGTH)
        table("stories260k", source, ids, windows, patterns)


def tokens(source: Source, path: Path) -> Tensor:
    stories = [story.strip() for story in path.read_text().split("\n\n") if story.strip()]
    return torch.cat([source.tokenizer()(story, return_tensors="pt")["input_ids"][0] for story in stories])


def table(name: str, source: Source, ids: Tensor, windows: Tensor, patterns: list[str]) -> None:
    assert source.folder is not None
    print(
        f"{name}: dense {perplexity(source, windows):.2f} "
        f"({len(ids)}×{LENGTH} calibrate, {len(windows)}×{LENGTH} evaluate)\n"
    )
    print("| | " + " | ".join(patterns) + " |\n|---|" + "---|" * len(patterns))
    rows = [("magnitude", "layer")] + [("wanda", schedule) for schedule in ("layer", "block", "dense")]
    for method, schedule in rows:
        cells = []
        for pattern in patterns:
            calibration = [ids] if method == "wanda" else None
            result = sparsify.compile(
                source.folder,
                [f"{method}:{pattern}"],
                calibration=calibration,
                schedule=schedule,  # type: ignore[arg-type]
            )
            pruned = Source(name, source.module, result.program.weights)
            left = sum("multiple" in s.reason for s in result.runs[0].skipped)
            cells.append(f"{perplexity(pruned, windows):.2f}" + (f" ({left} sites dense)" if left else ""))
        label = method if method == "magnitude" else f"{method}, {schedule}"
        print(f"| {label} | " + " | ".join(cells) + " |")
    print()


if __name__ == "__main__":
    main()
