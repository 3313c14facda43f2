"""Packed CPU kernels against the best dense product of torch: the figures C1 to C8 of docs/benchmarks.md.
Q: weights of 8 and 4 bits beside those of full width (``cpu/few_bits_rows.py``). A: attention of one token
(``cpu/attention_rows.py``).

    python tools/bench_cpu.py [--only C1,C2] [--rounds 11] [--json FILE]

One thread and its own CPU time (what the machine's other work takes is not counted), candidates interleaved call by
call, weights rotated over more than 130 MB of packed buffers, one ratio per round, the median of the rounds and their
range. The dense baseline is in each round the fastest of ``F.linear``, ``F.linear`` without oneDNN and oneDNN with
weights packed beforehand; ``ours, dense`` is our own dense kernel, which shows what the packing itself gains.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cpu import attention_rows, few_bits_rows
from torch import Tensor
from torch.nn import functional

from sparsify.host import processor
from sparsify.runtime import ops
from sparsify.runtime.codes import row_starts
from sparsify.runtime.cpu import native
from sparsify.runtime.layout import pack

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
TOLERANCE = {"bf16": 4e-3, "fp16": 4e-3, "fp32": 1e-5}
LARGE = [(4096, 4096), (11008, 4096)]


@dataclass(frozen=True)
class Case:
    """One line of the table. ``sparsity`` None: 2:4."""

    name: str
    rows: int
    columns: int
    dtype: str
    sparsity: float | None
    tokens: int
    bar: float

    @property
    def label(self) -> str:
        kind = "2:4" if self.sparsity is None else f"bitmask {self.sparsity:.0%}"
        return f"{self.rows}×{self.columns} {self.dtype} {kind}, {self.tokens} tokens"


def cases(avx2: bool) -> list[Case]:
    found = []
    for rows, columns in LARGE:
        found += [
            Case("C1", rows, columns, "bf16", None, 1, 1.4),
            Case("C2", rows, columns, "bf16", 0.5, 1, 1.3),
            Case("C3", rows, columns, "fp32", None, 1, 1.5),
            Case("C3", rows, columns, "fp32", 0.5, 1, 1.4),
        ]
        for dtype in ("bf16", "fp32"):
            found += [Case("C4", rows, columns, dtype, 0.7, 1, 1.8), Case("C4", rows, columns, dtype, 0.9, 1, 2.4)]
    found += [Case("C5", 4096, 11008, "bf16", None, 1, 1.3), Case("C5", 4096, 11008, "bf16", 0.5, 1, 1.1)]
    for dtype in DTYPES:
        for tokens in (1, 2, 4, 8, 16, 32, 64):
            # 2:4 is never unpacked (AVX-512); bitmasks are above 8 tokens, on the way.
            bar = 0.95 if tokens <= 8 else 0.8
            found += [Case("C6", 4096, 4096, dtype, s, tokens, bar if s else 1.0) for s in (None, 0.5, 0.9)]
    if avx2:
        # No bar was set for bitmasks there: they are shown so that nobody expects a gain.
        masks = [Case("C8 bitmask", 4096, 4096, dtype, 0.5, 1, 0.0) for dtype in DTYPES]
        return [Case("C8", 4096, 4096, dtype, None, 1, 1.2) for dtype in DTYPES] + masks
    return found


def weights(case: Case) -> Tensor:
    dense = torch.randn(case.rows, case.columns)
    if case.sparsity is None:
        kept = torch.rand(case.rows, case.columns // 4, 4).topk(2, dim=-1).indices
        dense *= torch.zeros(case.rows, case.columns // 4, 4).scatter_(-1, kept, 1.0).view_as(dense)
    else:
        dense *= torch.rand_like(dense) >= case.sparsity
    return dense.to(DTYPES[case.dtype])


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Time every candidate; check ours on the way."""
    weight = weights(case)
    packed = pack(weight, "packed24" if case.sparsity is None else "bitmask")
    starts = row_starts(packed.codes) if case.sparsity is not None else None
    copies = min(16, max(3, math.ceil(130e6 / packed.nbytes)))
    x = torch.randn(case.tokens, case.columns).to(weight.dtype)

    def ours(values: Tensor, codes: Tensor) -> Callable[[], Tensor]:
        if starts is None:
            return lambda: ops.linear_24(x, values, codes)
        return lambda: ops.linear_bitmask(x, values, codes, starts)

    def without_onednn(w: Tensor) -> Tensor:
        with torch.backends.mkldnn.flags(enabled=False):
            return functional.linear(x, w)

    dense = [weight.clone() for _ in range(copies)]
    candidates: dict[str, list[Callable[[], Tensor]]] = {
        "packed": [ours(packed.values.clone(), packed.codes.clone()) for _ in range(copies)],
        "F.linear": [partial(functional.linear, x, w) for w in dense],
        "F.linear without oneDNN": [partial(without_onednn, w) for w in dense],
    }
    if case.dtype == "fp32" or (case.dtype == "bf16" and native.isa() == 2):
        reordered = [torch.ops.mkldnn._reorder_linear_weight(w, case.tokens) for w in dense]
        pointwise = torch.ops.mkldnn._linear_pointwise
        candidates["oneDNN, packed before"] = [partial(pointwise, x, w, None, "none", [], "") for w in reordered]
    if case.tokens == 1:
        candidates["ours, dense"] = [partial(ops.linear_dense, x, w) for w in dense]
    if (case.tokens > 4 and case.dtype == "fp16") or (case.tokens > 1 and case.dtype != "fp32"):
        # Some hundred times slower than the others with several tokens: no candidate for the fastest.
        del candidates["F.linear without oneDNN"]

    exact = x.double() @ weight.double().t()
    error = float((candidates["packed"][0]().double() - exact).norm() / exact.norm())
    assert error < TOLERANCE[case.dtype], f"{case.label}: relative error {error}"
    times = interleaved(candidates, rounds)
    baselines = [name for name in times if name not in ("packed", "ours, dense")]
    ratios = sorted(min(times[n][r] for n in baselines) / times["packed"][r] for r in range(rounds))
    medians = {name: statistics.median(values) for name, values in times.items()}
    best = min(baselines, key=lambda n: medians[n])
    result = {
        "case": case.name,
        "label": case.label,
        "ratio": statistics.median(ratios),
        "low": ratios[0],
        "high": ratios[-1],
        "bar": case.bar,
        "best_dense": best,
        "bytes": weight.nbytes / packed.nbytes,
        "error": error,
        "gigabytes_per_second": packed.nbytes / medians["packed"] / 1e9,
        "milliseconds": {name: 1e3 * value for name, value in medians.items()},
    }
    if "ours, dense" in times:
        result["over_own_dense"] = medians["ours, dense"] / medians["packed"]
    return result


def interleaved(candidates: dict[str, list[Callable[[], Tensor]]], rounds: int) -> dict[str, list[float]]:
    """Seconds of CPU time of this thread per call: for each candidate the median of each round."""
    for calls in candidates.values():
        for call in calls:
            call()
    count = max(len(calls) for calls in candidates.values())
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        spent: dict[str, list[float]] = {name: [] for name in candidates}
        for i in range(count):
            for name, calls in candidates.items():
                start = time.thread_time()
                calls[i % len(calls)]()
                spent[name].append(time.thread_time() - start)
        for name, values in spent.items():
            times[name].append(statistics.median(values))
    return times


def overhead(rounds: int) -> dict[str, Any]:
    """C7: what a call of the operator costs beyond the kernel, on a 64×64 matrix, in microseconds."""
    packed = pack(weights(Case("C7", 64, 64, "fp32", None, 1, 8)), "packed24")
    x, y = torch.randn(1, 64), torch.empty(1, 64)
    library = native.library()
    assert library is not None

    def raw() -> Tensor:
        library.linear(
            native.isa(),
            0,
            packed.values.data_ptr(),
            64 * 32,
            packed.codes.data_ptr(),
            64 * 8,
            0,
            0,
            x.data_ptr(),
            64,
            0,
            -1,
            y.data_ptr(),
            64,
            64,
            16,
            1,
        )
        return y

    calls: dict[str, Callable[[], Tensor]] = {"op": lambda: ops.linear_24(x, packed.values, packed.codes), "raw": raw}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.thread_time()
            for _ in range(2000):
                call()
            times[name].append((time.thread_time() - start) / 2000 * 1e6)
    beyond = statistics.median(times["op"]) - statistics.median(times["raw"])
    return {"case": "C7", "label": "a call of the operator beyond the kernel, 64×64", "microseconds": beyond, "bar": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases, with commas between")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--avx2", action="store_true", help="C8: torch, oneDNN and the kernels held to AVX2")
    options = parser.parse_args()
    if options.avx2 and os.environ.get("SPARSIFY_CPU_ISA") != "avx2":
        held = {
            "ATEN_CPU_CAPABILITY": "avx2",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "MKL_ENABLE_INSTRUCTIONS": "AVX2",
            "SPARSIFY_CPU_ISA": "avx2",
        }
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=os.environ | held, check=False).returncode)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    only = set(filter(None, options.only.split(",")))
    assert native.library() is not None, "no kernels to measure"
    print(f"{processor()}, one thread, torch {torch.__version__}, kernels {native.ISAS[native.isa()]}")
    results = []
    for case in cases(options.avx2):
        if not only or case.name in only:
            results.append(r := measure(case, options.rounds))
            own = f", {r['over_own_dense']:.2f}× our own dense" if "over_own_dense" in r else ""
            verdict = "" if r["ratio"] >= case.bar else f"  BELOW the bar of {case.bar}"
            print(
                f"{case.name} {case.label}: {r['ratio']:.2f}× [{r['low']:.2f} … {r['high']:.2f}] of {r['best_dense']} "
                f"(bytes {r['bytes']:.2f}×, {r['gigabytes_per_second']:.1f} GB/s{own}){verdict}",
                flush=True,
            )
    if not options.avx2 and (not only or "C7" in only):
        results.append(overhead(options.rounds))
        print(f"C7 {results[-1]['label']}: {results[-1]['microseconds']:.1f} µs (bar 8)")
    for rows, columns in few_bits_rows.SHAPES if not options.avx2 and (not only or "Q" in only) else ():
        for row in few_bits_rows.measure(rows, columns, options.rounds, interleaved):
            results.append(row)
            print(few_bits_rows.described(row), flush=True)
    for row in attention_rows.measure(options.rounds, interleaved) if not only or "A" in only else ():
        results.append(row)
        print(attention_rows.described(row), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"processor": processor(), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
