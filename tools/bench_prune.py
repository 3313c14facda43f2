"""Time of whole wanda:2:4 and sparsegpt:2:4 runs against one plain forward of the same samples, and of parts alone.

    python tools/bench_prune.py [--layers 8] [--samples 32] [--length 512] [--repeat 3] [--dtype float32]
        [--only layer sparsegpt]
    python tools/bench_prune.py --parts

Prints ratios taken within one run; capture and model load are timed apart. The model is a seeded random Llama.
--parts: mask selection, and products of bfloat16 as torch computes them and as calibration does on this processor.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparsify.calibration.gradients import Samples
from sparsify.context import Context
from sparsify.data.batches import load_calibration
from sparsify.frontend.capture import capture
from sparsify.frontend.source import open_source
from sparsify.ir.store import MemoryStore
from sparsify.method.pattern import NM, parse_pattern
from sparsify.method.selection import select
from sparsify.method.weight_pass import WeightPass
from sparsify.passes.sparsegpt import SparseGPT
from sparsify.passes.wanda import Wanda
from sparsify.prune.engine import prune as run_engine
from sparsify.prune.names import Wanted
from sparsify.prune.targets import choose
from sparsify.runtime.cpu.wide import slow_dtypes, widened
from sparsify.words import Schedule


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--only", nargs="+", choices=["layer", "block", "dense", "sparsegpt"])
    parser.add_argument("--parts", action="store_true")
    args = parser.parse_args()
    print(f"{processor()}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads")
    if args.parts:
        selection()
        products()
    else:
        whole_runs(args)


def whole_runs(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        num_hidden_layers=args.layers,
        intermediate_size=2816,
        num_attention_heads=16,
        vocab_size=8192,
        max_position_embeddings=2048,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, args.dtype)).eval()
    ids = torch.randint(8192, (args.samples, args.length))
    source = open_source(model)
    data = load_calibration([ids], source)
    size = len(data.batches[0]["input_ids"])
    began = time.perf_counter()
    program = capture(source, data.batches[0])
    print(f"capture {time.perf_counter() - began:.1f} s; {args.samples}×{args.length} tokens, {size} sequences at once")
    pattern = NM(2, 4)
    targets, _ = choose(program, pattern, Wanted())

    def forward(rows: int) -> None:
        with torch.no_grad():
            for i in range(0, args.samples, rows):
                model.model(ids[i : i + rows], use_cache=False)

    def prune(weight_pass: WeightPass, schedule: Schedule) -> None:
        program.weights = source.weights.on(MemoryStore(source.weights.store))
        run_engine(program, weight_pass, targets, Samples(data.batches), Context(), schedule=schedule)

    runs: dict[str, Callable[[], None]] = {
        "layer": lambda: prune(Wanda(pattern), "layer"),
        "block": lambda: prune(Wanda(pattern), "block"),
        "dense": lambda: prune(Wanda(pattern), "dense"),
        "sparsegpt": lambda: prune(SparseGPT(pattern), "layer"),
    }
    jobs: dict[str, Callable[[], None]] = {
        "forward, 1 at once": lambda: forward(1),
        f"forward, {size} at once": lambda: forward(size),
        **{name: job for name, job in runs.items() if not args.only or name in args.only},
    }
    # Interleaved, best of each: a busy machine slows all of them alike.
    best = {name: [float("inf")] * 2 for name in jobs}
    for _ in range(args.repeat):
        for name, job in jobs.items():
            cpu = time.process_time()
            wall = timed(job)
            best[name] = [min(best[name][0], wall), min(best[name][1], time.process_time() - cpu)]
    plain = [min(best["forward, 1 at once"][i], best[f"forward, {size} at once"][i]) for i in (0, 1)]
    for name, (wall, cpu) in best.items():
        print(
            f"{name:20} {wall:7.2f} s  {wall / plain[0]:5.2f}× the faster forward; "
            f"CPU {cpu:7.2f} s  {cpu / plain[1]:5.2f}×"
        )


def selection() -> None:
    torch.manual_seed(0)
    weight, norms = torch.randn(4096, 4096), torch.rand(4096)
    scores = weight.abs() * norms
    product = min(timed(lambda: weight.abs() * norms) for _ in range(3))
    sort = min(timed(lambda: scores.sort()) for _ in range(3))
    print(f"4096×4096 float32: |W|·s {product * 1e3:.0f} ms, sort {sort * 1e3:.0f} ms")
    for text in ("2:4", "4:8", "50%"):
        pattern = parse_pattern(text)
        took = min(timed(lambda p=pattern: select(scores, p)) for _ in range(3))  # type: ignore[misc]
        print(
            f"select {text:4} {took * 1e3:4.0f} ms  {took / (product + sort):.2f}× (|W|·s + sort), "
            f"{took / sort:.2f}× sort"
        )


def products() -> None:
    slow = slow_dtypes()
    print(f"multiplied one number at a time here: {', '.join(sorted(map(str, slow))) or 'no dtype'}")
    ends = torch.tensor([512, 1024, 1536, 2048], dtype=torch.int32)
    x, picture = torch.randn(2048, 1024), torch.randn(8, 32, 56, 56)
    aten = torch.ops.aten
    jobs: dict[str, tuple[Any, tuple[torch.Tensor, ...]]] = {
        "linear": (aten.linear.default, (x, torch.randn(1024, 1024))),
        "mm": (aten.mm.default, (x, torch.randn(1024, 1024))),
        "4 experts": (aten._grouped_mm.default, (x, torch.randn(4, 1024, 512))),
        "conv2d": (aten.conv2d.default, (picture, torch.randn(32, 32, 3, 3))),
    }
    for name, (target, given) in jobs.items():
        ours = (widened(str(target._overloadpacket.__name__), target) if torch.bfloat16 in slow else None) or target
        rest = (ends,) if name == "4 experts" else ()
        short = [value.bfloat16() for value in given]
        exact, plain, wide = (spent(run, *of, *rest) for run, of in ((target, given), (target, short), (ours, short)))
        print(
            f"{name:10} float32 {exact * 1e3:6.1f} ms; bfloat16 {plain * 1e3:7.1f} ms, {plain / exact:5.1f}×; "
            f"as here {wide * 1e3:6.1f} ms, {wide / exact:4.2f}×"
        )


def spent(job: Callable[..., object], *given: object) -> float:
    """CPU seconds, the least of three."""
    found = []
    for _ in range(3):
        began = time.process_time()
        job(*given)
        found.append(time.process_time() - began)
    return min(found)


def timed(job: Callable[[], object]) -> float:
    began = time.perf_counter()
    job()
    return time.perf_counter() - began


def processor() -> str:
    try:
        with Path("/proc/cpuinfo").open() as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
