"""Structural pruning of the bundled model: size, speed and perplexity, before and after tuning. Figures "Structural".

    python tools/bench_structural.py [--minutes 5] [--only analysis,memory,speed,quality]

- quality: 20% and 50% by taylor-first, l2 and random; perplexity on held-out standard-library files, then after `tune`
  of
  so many minutes for taylor-first;
- analysis: coupled dimensions of an 80-layer graph of 70B's widths, against tracing it;
- speed: one forward pass of 256 tokens and greedy decoding, against the dense model in the same process, in turns;
- memory: what taylor-first adds at most, in processes of their own, for 8 and for 32 layers of one width.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

import sparsify
from sparsify.analysis.dimensions.groups import coupled_dimensions
from sparsify.data.batches import evaluation_windows
from sparsify.frontend.capture import capture
from sparsify.frontend.source import open_source
from sparsify.host import processor
from sparsify.quality.perplexity import perplexity
from sparsify.tuning.recipe import Recipe
from sparsify.tuning.tune import tune

BUNDLED = Path(__file__).parent.parent / "models" / "pycode-6m"
LENGTH = 256


def measured(folder: Path) -> float:
    source = open_source(folder)
    windows, _ = evaluation_windows("python-stdlib", source, LENGTH, 96)
    return perplexity(source, windows)


def pruned(ratio: str, importance: str, out: Path) -> sparsify.Compiled:
    return sparsify.compile(
        BUNDLED,
        [f"llm-pruner:{ratio},importance={importance},widths=uniform"],
        calibration="python-stdlib",
        samples=32,
        sequence_length=LENGTH,
        output=out,
    )


def quality(place: Path, minutes: float) -> None:
    print(f"\ndense: perplexity {measured(BUNDLED):.2f}\n")
    print("| ratio | importance | what is left | parameters | perplexity | after tuning |")
    print("|---|---|---|---|---|---|")
    for ratio in ("20%", "50%"):
        for importance in ("taylor-first", "l2", "random"):
            out = place / f"{ratio}-{importance}"
            done = pruned(ratio, importance, out).structure[0]
            before, after = done.parameters
            tuned = "–"
            if importance == "taylor-first" and minutes:
                recipe = Recipe(steps=10_000, minutes=minutes, samples=4000, batch=32, warmup=20, length=LENGTH)
                result = tune(out, "python-stdlib", place / f"{ratio}-tuned", recipe)
                tuned = f"{measured(place / f'{ratio}-tuned'):.2f} ({result.steps} steps)"
            left = done.lines()[0].partition(";")[0]
            print(
                f"| {ratio} | {importance} | {left} | {after / before:.3f}× | {measured(out):.2f} | {tuned} |",
                flush=True,
            )


def multiply_adds(model: Any) -> int:
    """Of the linear layers, for one token."""
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))


def in_turns(calls: list[Callable[[], object]], rounds: int = 9) -> float:
    """The first call's time by the second's: median over rounds."""
    ratios = []
    for number in range(rounds + 1):
        spent = []
        for call in calls:
            start = time.perf_counter()
            call()
            spent.append(time.perf_counter() - start)
        if number:
            ratios.append(spent[0] / spent[1])
    return statistics.median(ratios)


@torch.inference_mode()
def speed(place: Path) -> None:
    dense = transformers.AutoModelForCausalLM.from_pretrained(BUNDLED).eval()
    ids = torch.randint(5, 4000, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    options = {"do_sample": False, "min_new_tokens": 32, "max_new_tokens": 32, "pad_token_id": 0}
    print("\n| ratio | multiply-adds | forward of 256 tokens | decode of 32 |\n|---|---|---|---|")
    for ratio in ("20%", "50%"):
        out = place / f"{ratio}-speed"
        pruned(ratio, "l2", out)
        small = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
        both = (dense, small)
        forward = in_turns([partial(m, ids) for m in both])
        decode = in_turns([partial(m.generate, ids[:, :16], **options) for m in both])
        share = multiply_adds(small) / multiply_adds(dense)
        print(f"| {ratio} | {share:.3f}× | {forward:.2f}× faster | {decode:.2f}× faster |", flush=True)


MEMORY = """
import json, sys, torch
from sparsify.compiler.pipeline import compile
from sparsify.host import peak_memory, recent_peak, reset_peak
folder, out = sys.argv[1:]
# Once small, so that what is imported and traced for the first time is not counted.
ids = torch.randint(0, 100, (4, 64), generator=torch.Generator().manual_seed(0))
fresh = reset_peak(torch.device("cpu"))
before = (recent_peak(torch.device("cpu")) if fresh else None) or peak_memory()
compile(folder, ["llm-pruner:25%"], calibration=[ids], output=out, memory="32MiB")
print(json.dumps(((recent_peak(torch.device("cpu")) if fresh else None) or peak_memory()) - before))
"""


def memory(place: Path) -> None:
    peaks = {}
    for layers in (8, 32):
        config = transformers.LlamaConfig(
            hidden_size=512,
            intermediate_size=2048,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=8,
            vocab_size=1024,
            tie_word_embeddings=False,
        )
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(place / f"deep{layers}")
        words = [sys.executable, "-c", MEMORY, str(place / f"deep{layers}"), str(place / f"deep{layers}-out")]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        peaks[layers] = json.loads(done.stdout.strip().splitlines()[-1])
    print(
        f"\ntaylor-first adds {peaks[8] / 2**20:.0f} MiB with 8 layers and {peaks[32] / 2**20:.0f} MiB with 32: "
        f"{peaks[32] / peaks[8]:.2f}×"
    )


def analysis() -> None:
    seconds = {}
    for layers in (20, 80):
        config = transformers.LlamaConfig(
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=layers,
            num_attention_heads=64,
            num_key_value_heads=8,
            vocab_size=128256,
        )
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config)
        # Its frequencies are computed, and are no parameters.
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
        start = time.perf_counter()
        program = capture(open_source(model), {"input_ids": torch.zeros(1, 16, dtype=torch.long)})
        traced = time.perf_counter()
        found = coupled_dimensions(program)
        seconds[layers] = time.perf_counter() - traced
        print(
            f"{layers} layers: {len(program.nodes)} nodes traced in {traced - start:.1f} s, "
            f"{len(found.groups)} groups found in {seconds[layers]:.1f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--only", default="analysis,memory,speed,quality")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for part in options.only.split(","):
            {
                "analysis": analysis,
                "quality": lambda: quality(place, options.minutes),
                "speed": lambda: speed(place),
                "memory": lambda: memory(place),
            }[part]()


if __name__ == "__main__":
    main()
