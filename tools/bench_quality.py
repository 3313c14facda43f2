"""Perplexity, CPU time and memory of methods and pipelines on three models, as Markdown tables; runs are kept.

    python tools/bench_quality.py run stories|pycode|smollm2 [--shared ../shared] [--model FOLDER] [--seeds 0,1,2]
        [--passes twin,twin+refine] [--patterns 2:4,50%] [--samples 64] [--calibration self] [--threads 2]
    python tools/bench_quality.py                     # the tables of everything that was run: docs/quality.md

Each run is a process of its own and a line of tools/quality.jsonl, with machine and commit; one that is there is not
run again. Text that calibrates is never text that evaluates:

stories: stories260k, 64×256 tokens of calibration.txt (each story with its begin token, joined), all windows of 256
of heldout.txt. pycode: the bundled model, 64×256 tokens of the standard library, 64 windows of 256 of its held-out
half.
smollm2: SmolLM2-135M (``--model``, as tools/get_smollm2.py makes it), 64×512 tokens of wikitext-2's validation part,
64 windows of 512 of its test part; and of other kinds of text, 32 windows of Python source and of stories.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_prune import processor
from torch import Tensor

import sparsify
from sparsify.data.batches import evaluation_windows, load_calibration
from sparsify.data.sources import Documents
from sparsify.data.windows import random_windows
from sparsify.frontend.source import Source, open_source
from sparsify.quality.perplexity import perplexity

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "tools" / "quality.jsonl"
LENGTH = 256
PASSES = "magnitude,wanda,sparsegpt,alps,twin,twin+refine,permute+twin+refine"
PATTERNS = "50%,2:4,4:8"
# The methods whose bytes are compared.
BITS_OF = ("dense", "twin", "round:int8", "round:int4,group=64", "round:int3,group=64")
# Passes that a pattern of zeros says nothing to.
OWN_PATTERN = ("refine", "round")


@dataclass(frozen=True)
class Bench:
    """A model, the data that calibrates, and the windows that judge, by kind of text; the first is the judge."""

    source: Source
    calibration: Any
    windows: Mapping[str, Tensor]


def tokens(source: Source, path: Path) -> Tensor:
    stories = [story.strip() for story in path.read_text().split("\n\n") if story.strip()]
    return torch.cat([source.tokenizer()(story, return_tensors="pt")["input_ids"][0] for story in stories])


def bench(asked: Mapping[str, Any]) -> Bench:
    """The model and data of a run."""
    shared, seed, samples = Path(asked["shared"]), asked["seed"], asked["samples"]
    data = shared / "data"
    if asked["model"] == "stories":
        source = open_source(shared / "models" / "stories260k")
        stream = Documents("stories", [tokens(source, data / "stories" / "calibration.txt")])
        ids = random_windows(stream, lambda text, special=True: torch.empty(0), samples, LENGTH, seed)
        held = tokens(source, data / "stories" / "heldout.txt")
        return Bench(source, [ids], {"stories": held[: len(held) // LENGTH * LENGTH].view(-1, LENGTH)})
    if asked["model"] == "pycode":
        source, text, length = open_source(ROOT / "models" / "pycode-6m"), "python-stdlib", LENGTH
        judged = {"python": (text, 64)}
    else:
        source, length = open_source(asked["folder"]), 512
        text = str(data / "wikitext-2" / "valid.txt")
        judged = {
            "wikitext-2": (str(data / "wikitext-2" / "test.txt"), 64),
            "python": ("python-stdlib", 32),
            "stories": (str(data / "stories" / "heldout.txt"), 32),
        }
    text = asked["calibration"] or text
    rows = 1 if "gblm" in asked["passes"] else None
    drawn = load_calibration(text, source, samples=samples, sequence_length=length, seed=seed, rows=rows)
    windows = {kind: evaluation_windows(name, source, length, count)[0] for kind, (name, count) in judged.items()}
    return Bench(source, drawn, windows)


def specs(passes: str, pattern: str) -> list[str]:
    """``twin+refine`` at 2:4: twin:2:4, refine. Options follow the name: ``refine:rate=0.01``, ``round:int8``."""
    found = []
    for name in passes.split("+") if passes != "dense" else []:
        own, _, options = name.partition(":")
        words = [word for word in ("" if own in OWN_PATTERN else pattern, options) if word]
        found.append(f"{own}:{','.join(words)}" if words else own)
    return found


def one(asked: Mapping[str, Any]) -> dict[str, Any]:
    """A run, in this process."""
    torch.set_num_threads(asked["threads"])
    setup = bench(asked)
    source, wanted = setup.source, specs(asked["passes"], asked["pattern"])
    wall, cpu = time.perf_counter(), time.process_time()
    judged, regions, rates = source, None, None
    if wanted:
        assert source.folder is not None
        data = None if asked["passes"] == "magnitude" else setup.calibration
        result = sparsify.compile(source.folder, wanted, calibration=data, seed=asked["seed"])
        judged = Source(source.name, source.module, result.program.weights)
        kept = [region for run in result.runs for region in getattr(run, "regions", ())]
        regions = [sum(region.rate is not None for region in kept), len(kept)]
        rates = [region.rate for region in kept]
    took = {"wall_s": round(time.perf_counter() - wall, 1), "cpu_s": round(time.process_time() - cpu, 1)}
    took["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    found = {kind: round(perplexity(judged, windows), 4) for kind, windows in setup.windows.items()}
    return {"perplexity": found, **took, "refined": regions, "rates": rates}


def listed(passes: str) -> list[str]:
    """What stands between the commas of ``--passes``, but for those before an option."""
    return re.split(r",(?![a-z_]+=)", passes)


def without_pattern(passes: str) -> bool:
    return all(name.partition(":")[0] in OWN_PATTERN for name in passes.split("+"))


def bits(passes: str, pattern: str) -> float:
    """Bits that a weight of a pruned or rounded matrix takes packed: of its value, its place, and its scale (16 a
    group; for a whole row less than a hundredth). Half of the values are there under a pattern."""
    rounded = next((name for name in passes.split("+") if name.startswith("round")), "")
    value, group = re.match(r"(?:round:int(\d))?(?:,group=(\d+))?", rounded).groups()  # type: ignore[union-attr]
    return int(value or 16) * (0.5 if pattern else 1) + (1 if pattern else 0) + (16 / int(group) if group else 0)


def key(asked: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(asked[word] for word in ("model", "passes", "pattern", "seed", "samples", "calibration"))


def kept() -> list[dict[str, Any]]:
    return [json.loads(line) for line in KEPT.read_text().splitlines()] if KEPT.exists() else []


def run(args: argparse.Namespace) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    versions = f"python {platform.python_version()}, torch {torch.__version__}"
    where = {
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{processor()}, {versions}, {args.threads} threads",
    }
    done = {key(row) for row in kept()}
    seeds = [int(word) for word in args.seeds.split(",")]
    for pattern in ["", *args.patterns.split(",")]:
        asked_for = listed(args.passes)
        plain = [passes for passes in asked_for if without_pattern(passes)]
        for passes in [p for p in asked_for if p not in plain] if pattern else ["dense", *plain]:
            for seed in seeds if passes not in ("dense", "magnitude") else [0]:
                asked = {
                    "model": args.which, "passes": passes, "pattern": pattern, "seed": seed, "samples": args.samples,
                    "calibration": args.calibration, "shared": str(args.shared), "folder": str(args.model),
                }  # fmt: skip
                if passes in ("dense", "magnitude"):
                    asked |= {"samples": 0 if passes == "dense" else args.samples}
                if key(asked) in done:
                    continue
                words = json.dumps({**asked, "samples": args.samples, "threads": args.threads})
                child = subprocess.run(
                    [sys.executable, "-W", "ignore", __file__, "one", words], capture_output=True, text=True
                )
                if child.returncode:
                    said = child.stderr.strip() or f"ended with {child.returncode}"
                    print(f"{passes} {pattern}, seed {seed}: {said.splitlines()[-1]}", flush=True)
                    continue
                row = {word: asked[word] for word in asked if word not in ("shared", "folder")}
                row |= json.loads(child.stdout.splitlines()[-1]) | where
                with KEPT.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


def tables(rows: list[dict[str, Any]]) -> Iterable[str]:
    """A table for each model, number of sequences and text that calibrated: its own text, then what carries over."""
    everything, rows = rows, [row for row in rows if "round" not in row["passes"]]
    groups = dict.fromkeys((row["model"], row["samples"], row["calibration"]) for row in rows if row["samples"])
    for model, samples, text in groups:
        own = [r for r in rows if (r["model"], r["samples"], r["calibration"]) == (model, samples, text)]
        dense = next((r for r in rows if r["model"] == model and r["passes"] == "dense"), None)
        yield f"### {model}, {samples} sequences{f' of {text}' if text else ''}\n"
        if dense is not None:
            yield "Dense: " + ", ".join(f"{kind} {value:.2f}" for kind, value in dense["perplexity"].items()) + ".\n"
        kinds = list(own[0]["perplexity"])
        heads = [
            "",
            f"perplexity on {kinds[0]}",
            "loss",
            *kinds[1:],
            "CPU s",
            "wall s",
            "MiB",
            "blocks refined",
            "seeds",
        ]
        yield "| " + " | ".join(heads) + " |"
        yield "|---" * len(heads) + "|"
        for pattern in dict.fromkeys(r["pattern"] for r in own):
            wanda = mean([r for r in own if r["pattern"] == pattern and r["passes"] == "wanda"], kinds[0])
            for passes in dict.fromkeys(r["passes"] for r in own if r["pattern"] == pattern):
                yield line([r for r in own if (r["pattern"], r["passes"]) == (pattern, passes)], kinds, dense, wanda)
        yield ""
    yield from few_bits(everything)
    machines = sorted({f"{row['machine']} ({row['date']}, commit {row['commit']})" for row in everything})
    yield "Measured on: " + "; ".join(machines) + "."


def few_bits(rows: list[dict[str, Any]]) -> Iterable[str]:
    """What the bytes of a weight buy, of each model that was rounded: one calibration for all, fewest bits first."""
    for model in dict.fromkeys(row["model"] for row in rows if "round" in row["passes"]):
        own = [r for r in rows if r["model"] == model and r["samples"] in (0, 64) and not r["calibration"]]
        kind = next(iter(own[0]["perplexity"]))
        found: dict[tuple[float, str, str], list[float]] = {}
        for row in own:
            if row["pattern"] in ("", "2:4", "50%") and row["passes"].split("+")[0] in BITS_OF:
                name = (bits(row["passes"], row["pattern"]), row["passes"], row["pattern"])
                found.setdefault(name, []).append(row["perplexity"][kind])
        yield f"### {model}: zeros and few bits\n"
        yield f"| bits a weight | | perplexity on {kind} | seeds |"
        yield "|---|---|---|---|"
        for (each, passes, pattern), values in sorted(found.items()):
            deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            what = f"{passes}, {pattern}" if pattern else passes
            yield f"| {each:.2f} | {what} | {statistics.mean(values):.2f}{deviation} | {len(values)} |"
        yield ""


def line(found: list[dict[str, Any]], kinds: list[str], dense: dict[str, Any] | None, wanda: float | None) -> str:
    values = [row["perplexity"][kinds[0]] for row in found]
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    loss = ""
    if dense is not None and wanda is not None:
        least = math.log(dense["perplexity"][kinds[0]])
        loss = f"{(math.log(statistics.mean(values)) - least) / (math.log(wanda) - least):.3f}"
    refined = "/".join(map(str, found[0]["refined"])) if found[0]["refined"] and found[0]["refined"][1] else ""
    cells = [
        f"{found[0]['passes']}, {found[0]['pattern']}", f"{statistics.mean(values):.2f}{deviation}", loss,
        *(f"{mean(found, kind):.2f}" for kind in kinds[1:]),
        *(f"{min(row[word] for row in found):.0f}" for word in ("cpu_s", "wall_s")),
        str(max(row["peak_mib"] for row in found)),
        refined, str(len(found)),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def mean(found: list[dict[str, Any]], kind: str) -> float | None:
    return statistics.mean(row["perplexity"][kind] for row in found) if found else None


def main() -> None:
    if sys.argv[1:2] == ["one"]:
        print(json.dumps(one(json.loads(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("run", "table"), default="table")
    parser.add_argument("which", nargs="?", choices=("stories", "pycode", "smollm2"), default="stories")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--passes", default=PASSES)
    parser.add_argument("--patterns", default=PATTERNS)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--calibration", default="")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.what == "run":
        run(args)
    else:
        print("\n".join(tables(kept())))


if __name__ == "__main__":
    main()
