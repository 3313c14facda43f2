"""``report.md`` of what a run found: the tables that belong in docs/benchmarks.md. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from results import FAILED, Results

DENSE = "dense"
Steps = Mapping[str, Mapping[str, Any]]


def write_report(results: Results) -> None:
    content = results.read()
    lines = list(report(content))
    (results.out / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def report(content: Mapping[str, Any]) -> Iterator[str]:
    parts: Mapping[str, Steps] = content["parts"]
    if content["emulated"]:
        yield "**EMULATED on a CPU: every time below is made up, and none of it may be kept.**\n"
    yield from _first(parts.get("first", {}))
    yield from _checks(parts.get("checks", {}))
    yield from _shapes(parts.get("shapes", {}))
    yield from _integers(parts.get("shapes", {}))
    yield from _decode(parts.get("decode", {}))
    yield from _pruning(parts.get("pruning", {}))
    yield from _counters(parts.get("counters", {}))
    yield from ("", "| part | how it ended | seconds |", "|---|---|---|")
    for name, steps in parts.items():
        if (ended := steps.get("part")) is not None:
            yield f"| {name} | {ended['status']} | {ended['seconds']:.0f} |"
    failures = [(p, n, s[FAILED]) for p, steps in parts.items() for n, s in steps.items() if FAILED in s]
    if failures:
        yield from ("", "What failed (log.txt has it whole):", "")
        yield from (f"- {part}, {name}: {why}" for part, name, why in failures)


def found(steps: Steps, name: str) -> Mapping[str, Any] | None:
    """What step ``name`` found; None where it failed or did not run."""
    step = steps.get(name)
    return step if step is not None and FAILED not in step else None


def _first(steps: Steps) -> Iterator[str]:
    if (e := found(steps, "environment")) is not None:
        versions = ", ".join(f"{name} {version}" for name, version in e["versions"].items())
        yield f"{e['gpu']}, {e['multiprocessors']} multiprocessors, driver {e.get('driver', 'none')}; {versions}"
    if (c := found(steps, "ceilings")) is not None:
        copied, multiplied = f"{c['copy_tb_s']:.2f} TB/s, read and written", f"{c['dense_tflop_s']:.0f} TFLOP/s"
        yield f"\nA large copy moves {copied}; a large bfloat16 product does {multiplied}."
    compiled = {name: s for name, s in steps.items() if name.startswith("compile") and FAILED not in s}
    for name, s in compiled.items():
        yield f"\nNVRTC, {name.split()[1]}: {s['bytes'] >> 10} KiB in {s['compiled_in']:.1f} s."
    families = {name: s for name, s in steps.items() if "worst" in s}
    if families:
        yield "\nWithin 4e-3 of float64, worst: " + ", ".join(f"{n} {s['worst']:.1e}" for n, s in families.items())


def _checks(steps: Steps) -> Iterator[str]:
    sound = {n: s for n, s in steps.items() if n != "part" and FAILED not in s}
    tried = len(steps.keys() - {"part"})
    if tried:
        products = sum(s.get("products", 0) for s in sound.values())
        worst = max((s["worst"] for s in sound.values() if "worst" in s), default=float("nan"))
        yield f"\nChecks: {len(sound)} of {tried} passed, {products} products among them, worst {worst:.1e}."
        yield from (f"- {n}: {s['plan']}" for n, s in sound.items() if "plan" in s)
        yield from (f"- {n}: refused, {s['refused']}" for n, s in sound.items() if "refused" in s)


def _shapes(steps: Steps) -> Iterator[str]:
    times: dict[str, dict[str, Any]] = {}
    for name, step in steps.items():
        if "micro" in step:
            times.setdefault(name.partition(",")[0], {}).update(step["micro"])
    if not times:
        return
    counts = sorted({int(t) for micro in times.values() for t in micro})
    yield "\nTimes of cuBLAS by ours, bfloat16, CUDA graph, weights rotated over four times the L2 cache; kernel, µs:\n"
    yield "| rows×columns | " + " | ".join(f"{t}" for t in counts) + " |"
    yield "|---|" + "---|" * len(counts)
    for shape, micro in times.items():
        cells = []
        for tokens in counts:
            kernel, best = best_of(micro.get(str(tokens), {}))
            dense = micro.get(str(tokens), {}).get(DENSE)
            cells.append("–" if kernel is None or dense is None else f"{dense / best:.2f} {kernel} {best:.1f}")
        yield f"| {shape.replace('x', '×')} | " + " | ".join(cells) + " |"
    for model, layers in BLOCKS.items():
        cells = []
        for tokens in counts:
            micros = [times.get(shape, {}).get(str(tokens), {}) for shape in layers]
            whole = all(best_of(micro)[0] is not None and DENSE in micro for micro in micros)
            ratio = sum(m[DENSE] for m in micros) / sum(best_of(m)[1] for m in micros) if whole else None
            cells.append("–" if ratio is None else f"**{ratio:.2f}**")
        yield f"| **{model}, a block** | " + " | ".join(cells) + " |"
    yield "\n| one token | packed TB/s | dense TB/s |"
    yield "|---|---|---|"
    for shape, micro in times.items():
        rows, columns = map(int, shape.split("x"))
        size, (kernel, best) = 2 * rows * columns, best_of(micro.get("1", {}))
        if kernel is not None and DENSE in micro["1"]:
            dense = micro["1"][DENSE]
            yield f"| {shape.replace('x', '×')} | {0.5625 * size / best / 1e6:.2f} | {size / dense / 1e6:.2f} |"


def _integers(steps: Steps) -> Iterator[str]:
    """The same of 2:4 integers, by the name of the step."""
    times = {name: step["integers"] for name, step in steps.items() if "integers" in step}
    counts = sorted({int(t) for micro in times.values() for t in micro})
    if not counts:
        return
    yield "\n2:4 integers, the same; kernel, µs:\n"
    yield "| rows×columns, integers | " + " | ".join(f"{t}" for t in counts) + " |"
    yield "|---|" + "---|" * len(counts)
    for name, micro in times.items():
        cells = []
        for tokens in counts:
            kernel, best = best_of(micro.get(str(tokens), {}))
            dense = micro.get(str(tokens), {}).get(DENSE)
            cells.append("–" if kernel is None or dense is None else f"{dense / best:.2f} {kernel} {best:.1f}")
        yield f"| {name.replace('x', '×', 1)} | " + " | ".join(cells) + " |"


# Shapes of one decoder block, siblings joined.
BLOCKS = {
    "LLaMA-7B": ["12288x4096", "4096x4096", "22016x4096", "4096x11008"],
    "Llama-3-8B": ["6144x4096", "4096x4096", "28672x4096", "4096x14336"],
}


def best_of(micro: Mapping[str, float]) -> tuple[str | None, float]:
    """The fastest sparse kernel of one number of tokens, and its time."""
    kernels = {name: time for name, time in micro.items() if name != DENSE}
    return min(kernels.items(), key=lambda pair: pair[1]) if kernels else (None, float("nan"))


def _decode(steps: Steps) -> Iterator[str]:
    for name, s in steps.items():
        if "packed_tokens_s" not in s:
            continue
        dense, packed = s["weights_bytes"]
        yield (
            f"\nDecode, LLaMA-7B's shape, one sequence, static cache, {name}, CUDA graph: {s['dense_tokens_s']:.1f} → "
            f"{s['packed_tokens_s']:.1f} tokens/s, {s['ratio']:.2f}× ({s['low']:.2f} … {s['high']:.2f}); weights in "
            f"memory {packed / dense:.3f}×; logits of a prompt {s['logits_error']:.2e} from the "
            f"dense ones; {s['same_tokens']:.0%} of the tokens the same; {s['left_dense']} products "
            "left dense. Of a layer, 4 products (q/k/v and gate/up joined) against 7 dense ones."
        )


def _pruning(steps: Steps) -> Iterator[str]:
    runs = {n: s for n, s in steps.items() if "times_forward" in s}
    if runs:
        yield "\n| pruning a 1B-shaped model, 32 × 2048 tokens | seconds | plain forward | ratio | peak GPU memory |"
        yield "|---|---|---|---|---|"
        for name, s in runs.items():
            yield (
                f"| {name} | {s['whole_seconds']:.1f} | {s['forward_seconds']:.1f} | {s['times_forward']:.2f} | "
                f"{s['peak_bytes'] / 2**30:.1f} GiB (forward {s['forward_bytes'] / 2**30:.1f}) |"
            )
    shares = {name: s for name, s in steps.items() if "share" in s}
    if shares:
        yield "\n| pruned on the GPU and on the CPU | entries the same | bar |"
        yield "|---|---|---|"
        yield from (f"| {name} | {s['share']:.4f} | {s['bar']} |" for name, s in shares.items())
    if (c := found(steps, "command line")) is not None:
        dense, gpu, cpu = c["perplexities"]
        yield f"\nPerplexity of the bundled model on the GPU: {dense:.3f}; pruned there {gpu:.3f}, on a CPU {cpu:.3f}."
    if (m := found(steps, "metrics")) is not None:
        yield (
            f"\nOne square matrix, statistics included: wanda {m['wanda_seconds'] * 1e3:.2f} ms, sparsegpt "
            f"{m['sparsegpt_seconds'] * 1e3:.0f} ms, {m['cheaper']:.0f}×."
        )


def _counters(steps: Steps) -> Iterator[str]:
    if (n := found(steps, "ncu")) is not None:
        yield "\n| ncu, 22016×4096 | µs | TB/s read |"
        yield "|---|---|---|"
        for kernel, m in n["kernels"].items():
            nan = float("nan")
            micro = m.get("gpu__time_duration.sum", nan) / 1e3
            rate = m.get("dram__bytes_read.sum.per_second", nan) / 1e12
            yield f"| {kernel} | {micro:.1f} | {rate:.2f} |"
    for name in ("memcheck", "racecheck"):
        if (s := found(steps, name)) is not None:
            yield f"\n{name}: {s['summary']}"
