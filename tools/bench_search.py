"""How near ``sparsify search`` comes to a full sweep, and with how many trials, on the bundled model.

    python tools/bench_search.py [--pass wanda] [--budget "perplexity<=1.05"] [--step 5] [--lowest 30] [--highest 80]
        [--windows 16] [--samples 16] [--sequence-length 128] [--keep FOLDER] [--minutes 9]

The sweep is over every combination of percentages of all kinds of layers, ``--step`` apart. Those that are sparser than
what the search found are tried in the order of their zeros; one that has no fewer zeros of any kind than another that
broke the budget is taken to break it too. With ``--pass wanda:2:4`` it is over every choice of the parts that are
pruned, kinds in two halves of the blocks. Trials are kept in ``--keep``: a sweep that was stopped by ``--minutes`` goes
on when it is run again. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from sparsify.context import Context
from sparsify.method.spec import has_pattern, spec_text
from sparsify.searching.budget import parse_budget
from sparsify.searching.parts import cells, size_of
from sparsify.searching.search import parse_method
from sparsify.searching.settings import ByKind, ByPart
from sparsify.searching.strategy.rounds import GRID, by_parts, by_percentages
from sparsify.searching.trials import Trial, Trials
from sparsify.searching.workbench import Words, Workbench, zeros_of

ROOT = Path(__file__).parents[1]


@dataclass
class Sweep:
    """Trials of settings on one workbench, kept."""

    bench: Workbench
    way: ByKind | ByPart
    trials: Trials
    asked: int = 0

    def perplexity(self, levels: Mapping[str, int], words: str) -> float:
        self.asked += 1
        shares = self.way.shares(levels)
        trial = self.trials.find(shares)
        if trial is None:
            started, setting = time.perf_counter(), self.way.setting(levels)
            weights, results = self.bench.prune(setting.own, setting.targets)
            found, zeros = self.bench.judge.perplexity(weights), zeros_of(results)
            share, took = zeros / sum(map(size_of, self.bench.targets)), time.perf_counter() - started
            number = len(self.trials) + 1
            trial = Trial(number, words, shares, setting.spec, setting.ignore, found, share, round(took, 3))
            self.trials.keep(trial)
        return trial.perplexity


def settings(sizes: Mapping[str, int], levels: range) -> Iterator[dict[str, int]]:
    """Every combination, those with fewest zeros first."""
    every = [dict(zip(sizes, chosen, strict=True)) for chosen in itertools.product(levels, repeat=len(sizes))]
    return iter(sorted(every, key=lambda setting: sum(sizes[kind] * level for kind, level in setting.items())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pass", dest="method", default="wanda")
    parser.add_argument("--budget", default="perplexity<=1.05")
    for name, value in {"step": 5, "lowest": 30, "highest": 80, "windows": 16, "samples": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--keep", type=Path, default=ROOT / "build" / "bench-search")
    parser.add_argument("--minutes", type=float, default=9.0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    stop = time.perf_counter() + 60 * asked.minutes
    words = Words("python-stdlib", None, asked.windows, asked.samples, asked.sequence_length, "dense")
    own, budget, fixed = parse_method(asked.method), parse_budget(asked.budget), has_pattern(asked.method)
    with Workbench(ROOT / "models" / "pycode-6m", own, words, Context()) as bench:
        bench.draw()
        parts = cells(bench.targets, 2)
        way: ByKind | ByPart = ByPart(own, parts) if fixed else ByKind(own, bench.targets)
        if isinstance(way, ByPart):
            sizes = {part.name: part.size for part in parts}
        else:
            sizes = {kind: sum(map(size_of, members)) for kind, members in way.kinds.items()}
        trials = Trials({**bench.question(), "pass": spec_text(own), "pattern": fixed, "halves": fixed}, asked.keep)
        sweep, dense = Sweep(bench, way, trials), bench.judge.perplexity(bench.dense)
        limit = budget.limit(dense)

        def excess(levels: Mapping[str, int], said: str) -> float:
            return math.log(sweep.perplexity(levels, said) / limit)

        def share(levels: Mapping[str, int]) -> float:
            most = 1 / float(own.pattern.sparsity) if fixed else GRID
            return sum(sizes[kind] * level for kind, level in levels.items()) / sum(sizes.values()) / most

        over, found = math.log(dense / limit), None
        if fixed:
            chosen = by_parts(excess, sizes, over)
            found = None if chosen is None else {name: int(name in chosen) for name in sizes}
        else:
            found = by_percentages(excess, sizes, over)
        assert found is not None, "nothing was within the budget"
        searched, best, broken, complete = sweep.asked, found, list[dict[str, int]](), True
        levels = (
            range(2)
            if fixed
            else range(*(level * GRID // 100 for level in (asked.lowest, asked.highest + 1, asked.step)))
        )
        for setting in settings(sizes, levels):
            if share(setting) <= share(best) or any(all(setting[k] >= one[k] for k in sizes) for one in broken):
                continue
            if time.perf_counter() > stop:
                complete = False
                break
            if excess(setting, "sweep") <= 0:
                best = setting
            else:
                broken.append(setting)
        alike = None
        if not fixed:
            held = [level for level in range(1, GRID) if _known(sweep, dict.fromkeys(sizes, level)) <= limit]
            alike = max(held, default=0) / GRID
        print(
            json.dumps(
                {
                    "pass": asked.method,
                    "budget": str(budget),
                    "dense": round(dense, 4),
                    "kinds": len(sizes),
                    "trials": searched,
                    "alike": alike,
                    "found": round(share(found), 4),
                    "found_levels": found,
                    "sweep_trials": sweep.asked - searched,
                    "sweep_best": round(share(best), 4),
                    "sweep_levels": best,
                    "of_best": round(share(found) / share(best), 4),
                    "complete": complete,
                }
            )
        )


def _known(sweep: Sweep, levels: Mapping[str, int]) -> float:
    trial = sweep.trials.find(sweep.way.shares(levels))
    return math.inf if trial is None else trial.perplexity


if __name__ == "__main__":
    main()
