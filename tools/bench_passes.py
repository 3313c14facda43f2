"""Cost of the methods that move weights, as ratios taken within one run.

    python tools/bench_passes.py [sweep] [exact] [model] [permute]

``sweep``: SparseGPT against the official column-by-column loop, siblings that share an input, Wanda's metric.
``exact``: conjugate gradients against one factorisation per output neuron (timed on a sample of rows). ``model``:
SparseGPT over a whole Llama against wanda and the floor of its own Gram products and solves. ``permute``,
where it is named: its search over one block as wide as LLaMA-7B's against a run of wanda on it, in CPU seconds of one
thread.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any
from unittest.mock import patch

import torch
from bench_prune import processor, timed
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sparsify.calibration.gradients import Samples
from sparsify.calibration.recorder import GroupRecorder
from sparsify.context import Context
from sparsify.data.batches import load_calibration
from sparsify.frontend.capture import capture
from sparsify.frontend.source import open_source
from sparsify.ir.store import MemoryStore
from sparsify.method.channel_pass import ChannelPass
from sparsify.method.pattern import parse_pattern
from sparsify.method.selection import select
from sparsify.method.spec import parse_pass
from sparsify.method.statistics import InputStatistics
from sparsify.method.weight_pass import WeightPass
from sparsify.passes.solvers.exact import conjugate_gradients, solve_rows
from sparsify.passes.solvers.gram import damped_gram
from sparsify.passes.solvers.sweep import sweep
from sparsify.passes.sparsegpt import SparseGPT
from sparsify.prune.engine import prune
from sparsify.prune.names import Wanted
from sparsify.prune.targets import choose
from sparsify.structure import reorder as reordering
from sparsify.structure.reorder import choose_lanes, reorder

CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=["sweep", "exact", "model"])
    args = parser.parse_args()
    print(f"{processor()}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    with torch.no_grad():
        for part in args.parts:
            {"sweep": bench_sweep, "exact": bench_exact, "model": bench_model, "permute": bench_permute}[part]()


def weight_pass_of(spec: str) -> WeightPass:
    found = parse_pass(spec)
    assert isinstance(found, WeightPass), spec
    return found


def activations(tokens: int, features: int) -> Tensor:
    """Inputs that vary together as a network's do: a spectrum that falls as a power, features of different scales."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(features, features, generator=generator)).Q
    spectrum = torch.arange(1, features + 1).float() ** -0.7
    scales = torch.exp(0.5 * torch.randn(features, generator=generator))
    return torch.randn(tokens, features, generator=generator) * spectrum @ turn * scales


def statistics(inputs: Tensor) -> InputStatistics:
    gram = inputs.t() @ inputs
    return InputStatistics({"gram": gram, "squared_norm": gram.diagonal().double()}, len(inputs), 1)


def official(weight: Tensor, gram: Tensor, text: str) -> tuple[Tensor, Tensor]:
    """The loop of the official SparseGPT, in float32: blocks of 128 columns, one column at a time."""
    w, h = weight.clone(), gram.clone()
    h.diagonal().add_(0.01 * h.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    pruned = torch.zeros_like(w, dtype=torch.bool)
    kept, m = map(int, text.split(":")) if ":" in text else (0, 0)
    for start in range(0, w.shape[1], 128):
        stop = min(start + 128, w.shape[1])
        block, local = w[:, start:stop].clone(), inverse[start:stop, start:stop]
        result, errors = torch.zeros_like(block), torch.zeros_like(block)
        mask = torch.zeros_like(block, dtype=torch.bool)
        if not m:
            scores = block**2 / local.diagonal() ** 2
            count = int(scores.numel() * float(text.rstrip("%")) / 100)
            mask = scores <= scores.flatten().sort().values[count - 1]
        for i in range(stop - start):
            column, scale = block[:, i], local[i, i]
            if m and i % m == 0:
                scores = block[:, i : i + m] ** 2 / local.diagonal()[i : i + m] ** 2
                mask.scatter_(1, i + scores.topk(m - kept, dim=1, largest=False).indices, True)
            new = column.clone()
            new[mask[:, i]] = 0
            result[:, i] = new
            error = (column - new) / scale
            block[:, i:] -= error.unsqueeze(1) @ local[i, i:].unsqueeze(0)
            errors[:, i] = error
        w[:, start:stop], pruned[:, start:stop] = result, mask
        w[:, stop:] -= errors @ inverse[start:stop, stop:]
    return w, pruned


def bench_sweep() -> None:
    print("SparseGPT, from a Gram matrix to the new weight, float32; best of 3\n")
    print("| out × in | pattern | column by column | ours | faster | same mask | weights differ by |")
    print("|---|---|---|---|---|---|---|")
    inputs = activations(8192, 4096)
    stats = statistics(inputs)
    for rows in (4096, 11008):
        weight = torch.randn(rows, 4096, generator=torch.Generator().manual_seed(1))
        for text in ("2:4", "50%"):
            method = weight_pass_of(f"sparsegpt:{text}")
            theirs, ours = float("inf"), float("inf")
            for _ in range(3):
                stats.derived.clear()
                ours = min(ours, timed(lambda: method.prune(weight, stats)))  # noqa: B023
                theirs = min(theirs, timed(lambda: official(weight, stats.gram, text)))  # noqa: B023
            reference, mask = official(weight, stats.gram, text)
            pruned = method.prune(weight, stats)
            same = (pruned.mask == mask).all(dim=1)
            apart = float((pruned.weight[same] - reference[same]).norm() / reference[same].norm())
            agreement = float((pruned.mask == mask).float().mean())
            print(
                f"| {rows}×4096 | {text} | {theirs:.2f} s | {ours:.2f} s | {theirs / ours:.2f}× | {agreement:.4%} | "
                f"{apart:.1e} ({int(same.sum())} rows with the same mask) |",
                flush=True,
            )
    weights = [torch.randn(4096, 4096, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    method = SparseGPT(parse_pattern("2:4"))

    def siblings(shared: bool) -> None:
        # Each site of its own would record its own Gram matrix and factor it.
        for number, weight in enumerate(weights):
            if number == 0 or not shared:
                record = recorded(inputs, ("gram", "squared_norm"))
            method.prune(weight, record)

    together, apart = timed(lambda: siblings(True)), timed(lambda: siblings(False))
    print(
        f"\nthree siblings of 4096×4096 on 8192 tokens: {together:.2f} s sharing one Gram matrix and factor, "
        f"{apart:.2f} s each its own, {apart / together:.2f}×"
    )
    weight = weights[0]
    wanda = parse_pass("wanda:2:4")
    cheap = min(timed(lambda: wanda.scores(weight, recorded(inputs, ("squared_norm",)))) for _ in range(6))  # type: ignore[attr-defined]
    dear = min(timed(lambda: method.prune(weight, recorded(inputs, ("gram", "squared_norm")))) for _ in range(2))
    print(
        f"metric of one 4096×4096 site on 8192 tokens, statistics included: wanda {cheap * 1e3:.0f} ms, "
        f"sparsegpt {dear:.2f} s, {dear / cheap:.0f}×\n"
    )


def recorded(inputs: Tensor, wanted: tuple[str, ...]) -> InputStatistics:
    """Statistics as the engine records them, in batches, without its error sketch."""
    recorder = GroupRecorder(wanted, 1, inputs.shape[1], CPU)
    for batch in inputs.split(2048):
        for accumulator in recorder.accumulators.values():
            accumulator.update(0, batch, batch)
    return recorder.statistics(0, 1)


def bench_exact(rows: int = 64) -> None:
    print(
        "exact solution for the kept weights, 4096×4096, mask S, objectives against the exact one; Cholesky timed on "
        f"{rows} rows and multiplied\n"
    )
    print("| pattern | sweep | Cholesky per row, float64 | conjugate gradients | cheaper | objective | sweep's |")
    print("|---|---|---|---|---|---|---|")
    gram = damped_gram(statistics(activations(8192, 4096)), 0.01)
    weight = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(1))
    for text in ("2:4", "50%"):
        mask = select(weight.square() / gram.inverse_diagonal, parse_pattern(text))
        began = time.perf_counter()
        swept, _ = sweep(weight, gram.root, mask, 4096)
        first = time.perf_counter()
        ours = conjugate_gradients(weight, gram.matrix, mask, swept)
        second = time.perf_counter()
        exact = solve_rows(weight[:rows], gram.matrix, mask[:rows]).float()
        slow = (time.perf_counter() - second) * 4096 / rows
        fast = second - began

        def objective(result: Tensor) -> float:
            apart = (result[:rows] - weight[:rows]).double()
            return float(((apart @ gram.matrix.double()) * apart).sum())

        best = objective(exact)
        print(
            f"| {text} | {first - began:.1f} s | {slow:.0f} s | {fast:.1f} s, sweep included | {slow / fast:.1f}× | "
            f"{objective(ours) / best:.5f} | {objective(swept) / best:.3f} |",
            flush=True,
        )
    print()


def bench_model() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        num_hidden_layers=8,
        intermediate_size=2816,
        num_attention_heads=16,
        vocab_size=8192,
        max_position_embeddings=2048,
    )
    model = LlamaForCausalLM(config).eval()
    source = open_source(model)
    data = load_calibration([torch.randint(8192, (32, 512))], source)
    program = capture(source, data.batches[0])

    def run(spec: str) -> None:
        weight_pass = weight_pass_of(spec)
        targets, _ = choose(program, weight_pass.pattern, Wanted())
        program.weights = source.weights.on(MemoryStore(source.weights.store))
        prune(program, weight_pass, targets, Samples(data.batches), Context(), dense=source.weights)

    weights = {n: p for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n}
    inputs = {width: torch.randn(2048, width) for width in (1024, 2816)}

    def gram_floor() -> None:
        for width, groups in ((1024, 3), (2816, 1)):
            for _ in range(groups * 8):
                total = torch.zeros(width, width)
                for _ in range(8):
                    total.addmm_(inputs[width].t(), inputs[width])

    def solve_floor() -> None:
        method: Any = SparseGPT(parse_pattern("2:4"))
        stats = {width: statistics(x) for width, x in inputs.items()}
        for name, weight in weights.items():
            if not name.endswith(("k_proj.weight", "v_proj.weight", "up_proj.weight")):
                stats[weight.shape[1]].derived.clear()
            method.prune(weight, stats[weight.shape[1]])

    jobs = {
        "wanda:2:4": lambda: run("wanda:2:4"),
        "sparsegpt:2:4": lambda: run("sparsegpt:2:4"),
        "Gram products alone": gram_floor,
        "factors and sweeps alone": solve_floor,
    }
    best = dict.fromkeys(jobs, float("inf"))
    for _ in range(2):
        for name, job in jobs.items():
            best[name] = min(best[name], timed(job))
    floor = best["wanda:2:4"] + best["Gram products alone"] + best["factors and sweeps alone"]
    print("Llama of hidden 1024, 8 layers, intermediate 2816, 32 × 512 tokens; best of 2\n")
    print("| | seconds |\n|---|---|")
    for name, seconds in best.items():
        print(f"| {name} | {seconds:.2f} |")
    print(
        f"\nsparsegpt:2:4 takes {best['sparsegpt:2:4'] / floor:.2f}× of wanda + Gram products + solves, "
        f"{best['sparsegpt:2:4'] / best['wanda:2:4']:.2f}× of wanda\n"
    )


def bench_permute(sequences: int = 4, length: int = 2048) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        hidden_size=4096, num_hidden_layers=1, intermediate_size=11008, num_attention_heads=32, vocab_size=1024,
        max_position_embeddings=2048,
    )  # fmt: skip
    source = open_source(LlamaForCausalLM(config).eval())
    data = load_calibration([torch.randint(1024, (sequences, length))], source)
    program = capture(source, data.batches[0])
    program.weights = source.weights.on(MemoryStore(source.weights.store))
    own = parse_pass("permute:2:4")
    assert isinstance(own, ChannelPass)
    lanes, _ = choose_lanes(program, own, Wanted())
    began = time.process_time()
    # Without a token: every channel is as large as any other, and the search is all that takes time.
    alike = {site.parameter: torch.ones(1, site.shape[1]) for own_lanes in lanes for site in own_lanes.sites}
    with patch.object(reordering, "_measured", lambda *_: alike):
        results, _, _ = reorder(program, own, lanes, data.batches, Context())
    search = time.process_time() - began
    began = time.process_time()
    wanda = weight_pass_of("wanda:2:4")
    prune(program, wanda, choose(program, wanda.pattern, Wanted())[0], Samples(data.batches), Context(), dense=None)
    whole = time.process_time() - began
    for result in results:
        size = f"{result.lanes} lanes of {result.channels // result.lanes}"
        print(f"{result.name}: {size}, kept {result.before:.4f} → {result.after:.4f}")
    print(f"permute:2:4, search {search:.1f} CPU s; wanda:2:4 on {sequences}×{length} tokens {whole:.1f} CPU s\n")


if __name__ == "__main__":
    main()
