"""2:4 products on the GPU at hand: checked first, then timed against cuBLAS. The figures "CUDA" of docs/benchmarks.md.

    python tools/bench_cuda.py [-o FOLDER] [--only checks,shapes,decode] [--policy both]

Needs an NVIDIA GPU (Ampere or later) and a CUDA build of torch; some minutes on one H200. Writes bench_cuda.json and
bench_cuda.md into FOLDER and prints the latter.

- checks: every kernel, on fresh random data, into poisoned memory, against float64 (4e-3); under CUDA graphs, on
  another
  stream, on every GPU, compiled with mode="reduce-overhead", and twice with the same bits;
- shapes: LLaMA-7B's and Llama-3-8B's products (q/k/v and gate/up joined), bfloat16. Weights are rotated over copies of
  four times the L2 cache, calls replayed from a CUDA graph; ratios to cuBLAS of the same run;
- decode: a random Llama of LLaMA-7B's shape, one sequence, static cache, compiled: tokens/s and weights in memory.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparsify.runtime.ops  # noqa: F401
from sparsify.errors import Refused
from sparsify.runtime.cuda import products
from sparsify.runtime.cuda.autotune.clock import GPUClock
from sparsify.runtime.cuda.autotune.times import race, random_24
from sparsify.runtime.cuda.dispatch import BUCKETS, DENSE, Timings
from sparsify.runtime.cuda.fragments import to_fragments
from sparsify.runtime.cuda.gpu import GPU, current_gpu
from sparsify.runtime.cuda.prepared import PreparedWeight, prepare_weight
from sparsify.runtime.cuda.variants import VARIANTS, Variant
from sparsify.runtime.layout import unpack
from sparsify.runtime.words import POLICIES, Policy

# (layers, rows, columns) of one decoder block, siblings joined.
SHAPES = {
    "LLaMA-7B": [("qkv", 12288, 4096), ("o", 4096, 4096), ("gate_up", 22016, 4096), ("down", 4096, 11008)],
    "Llama-3-8B": [("qkv", 6144, 4096), ("o", 4096, 4096), ("gate_up", 28672, 4096), ("down", 4096, 14336)],
}
BAR = 4e-3


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def poison(numel: int, dtype: torch.dtype, device: torch.device) -> None:
    """Leave NaN in the memory that torch's allocator gives out next."""
    torch.full((numel,), float("nan"), dtype=dtype, device=device)


def check_kernels(device: torch.device) -> int:
    """Every variant on ragged shapes, and every library; how many products."""
    count = 0
    for dtype in (torch.bfloat16, torch.float16):
        for rows, columns in ((16, 256), (100, 1096), (4096, 4096), (1024, 11008)):
            packed = random_24(rows, columns, dtype, device)
            dense, fragments = unpack(packed), to_fragments(packed)
            bias = torch.randn(rows, device=device).to(dtype)
            splits = [Variant("tiled", 8, 2, 8, s) for s in (2, 4) if s <= fragments.shape[1]]
            for tokens in (1, 2, 7, 8, 9, 16, 17, 33, 64, 200):
                x = torch.randn(tokens, columns, device=device).to(dtype)
                exact = x.double() @ dense.double().t() + bias.double()
                names = [v.name for v in (*VARIANTS, *splits) if v.fits(tokens, columns)] + ["unpack"]
                for name in names:
                    poison(tokens * rows, dtype, device)
                    y = products.run_kernel(name, x, fragments, None, None, rows, bias)
                    found = error(y, exact)
                    assert found < BAR, (name, dtype, rows, columns, tokens, found)
                    assert torch.equal(y, products.run_kernel(name, x, fragments, None, None, rows, bias)), (
                        name,
                        "differs",
                    )
                    count += 1
    return count


def check_policies(device: torch.device) -> list[str]:
    """The operator under each policy that this GPU has; their plans."""
    plans = []
    for policy in POLICIES:
        packed = random_24(4096, 4096, torch.bfloat16, device)
        weight = prepare_weight(packed, policy, tune=False)
        if isinstance(weight, Refused):
            plans.append(f"{policy}: {weight.reason}")
            continue
        dense = unpack(packed)
        for shape in ((0, 4096), (1, 4096), (3, 5, 4096), (16, 4096), (100, 4096), (1000, 4096)):
            x, bias = torch.randn(shape, device=device).bfloat16(), torch.randn(4096, device=device).bfloat16()
            poison(max(1, x.numel()), torch.bfloat16, device)
            y = weight.linear(x, bias)
            if x.numel():
                found = error(y, x.double() @ dense.double().t() + bias.double())
                assert found < BAR, (policy, shape, found)
        back = weight.portable()
        assert torch.equal(unpack(back), dense), f"{policy}: another matrix comes back"
        plans.append(f"{policy}: {weight.plan}")
    return plans


def check_torch(device: torch.device) -> list[str]:
    """CUDA graphs, streams, threads, several GPUs, torch.compile."""
    import threading

    packed = random_24(4096, 4096, torch.bfloat16, device)
    dense, weight = unpack(packed), prepare_weight(packed, tune=False)
    assert isinstance(weight, PreparedWeight), weight
    done = []
    for tokens in (1, 16, 100, 600):
        x = torch.randn(tokens, 4096, device=device).bfloat16()
        wanted = weight.linear(x)
        graph, static = torch.cuda.CUDAGraph(), torch.zeros_like(x)
        weight.linear(static)
        with torch.cuda.graph(graph):
            y = weight.linear(static)
        static.copy_(x)
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, wanted), f"a CUDA graph of {tokens} tokens gives other numbers"
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            other = weight.linear(x)
        torch.cuda.current_stream(device).wait_stream(stream)
        assert torch.equal(other, wanted), f"another stream gives other numbers for {tokens} tokens"
    done += ["CUDA graphs", "streams"]
    results: list[Tensor] = []
    thread = threading.Thread(target=lambda: results.append(weight.linear(x)))
    thread.start()
    thread.join()
    assert results and torch.equal(results[0], wanted)
    done.append("threads")
    bias = torch.randn(4096, device=device).bfloat16()

    def step(x: Tensor) -> Tensor:
        return weight.linear(torch.relu(weight.linear(x, bias)))

    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    with torch.inference_mode():
        for _ in range(4):
            x = torch.randn(1, 4096, device=device).bfloat16()
            exact = torch.relu(x.double() @ dense.double().t() + bias.double()) @ dense.double().t()
            assert error(compiled(x).clone(), exact) < 2 * BAR
    done.append('torch.compile(mode="reduce-overhead")')
    for number in range(1, torch.cuda.device_count()):
        there = random_24(4096, 4096, torch.bfloat16, torch.device("cuda", number))
        second = prepare_weight(there, tune=False)
        assert isinstance(second, PreparedWeight), second
        x = torch.randn(4, 4096, device=there.values.device).bfloat16()
        assert error(second.linear(x), x.double() @ unpack(there).double().t()) < BAR
        done.append(f"GPU {number}")
    try:
        from sparsify.runtime.cuda import triton_kernels
    except ImportError:
        return [*done, "no Triton here"]
    for tokens in (1, 5, 16):
        x = torch.randn(tokens, 4096, device=device).bfloat16()
        y = triton_kernels.linear(x, packed.values, packed.codes, None)
        assert error(y, x.double() @ dense.double().t()) < BAR, ("triton", tokens)
    return [*done, "Triton"]


def time_shapes(device: torch.device, policy: Policy) -> dict[str, Timings]:
    library = GPU.of(device).library_for(policy)
    clock, found = GPUClock(device), {}
    for shape in sorted({(rows, columns) for layers in SHAPES.values() for _, rows, columns in layers}):
        start = time.perf_counter()
        found["{}x{}".format(*shape)] = race(*shape, torch.bfloat16, policy, library, device, clock)
        print(f"{shape[0]}x{shape[1]}: {time.perf_counter() - start:.0f} s", flush=True)
        torch.cuda.empty_cache()
    return found


def tables(times: dict[str, Timings]) -> list[str]:
    """Ratios to cuBLAS by number of tokens: of each product, and of all of a block."""
    lines = []
    for model, layers in SHAPES.items():
        lines += [
            "",
            f"### {model}",
            "",
            "| product | " + " | ".join(map(str, BUCKETS)) + " |",
            "|---|" + "---|" * len(BUCKETS),
        ]
        sums = {t: [0.0, 0.0] for t in BUCKETS}
        for name, rows, columns in layers:
            timings = times[f"{rows}x{columns}"]
            cells = []
            for tokens in BUCKETS:
                kernel, micro = timings.best(tokens)
                sums[tokens][0] += timings.micro[tokens][DENSE]
                sums[tokens][1] += micro
                cells.append(f"{timings.gain(tokens):.2f}× {kernel} {micro:.1f} µs")
            lines.append(f"| {name} {rows}×{columns} | " + " | ".join(cells) + " |")
        lines.append("| **block** | " + " | ".join(f"**{a / b:.2f}×**" for a, b in sums.values()) + " |")
    return lines


def bandwidth(times: dict[str, Timings]) -> list[str]:
    """How much of the packed weights a second one token reads."""
    lines = ["", "| product | packed TB/s, one token | dense TB/s |", "|---|---|---|"]
    for shape, timings in times.items():
        rows, columns = map(int, shape.split("x"))
        size, micro = 2 * rows * columns, timings.best(1)[1]
        lines.append(f"| {shape} | {0.5625 * size / micro / 1e6:.2f} | {size / timings.micro[1][DENSE] / 1e6:.2f} |")
    return lines


def llama(device: torch.device, tune: bool = True, **sizes: int) -> tuple[Any, Any]:
    """A random model of LLaMA-7B's shape, its blocks 2:4: dense, and prepared for this GPU."""
    import copy

    import transformers

    from sparsify.backends.packed.format import PackedSite
    from sparsify.backends.packed.loaded import prepare as prepare_model
    from sparsify.backends.packed.loaded.modules import pack_modules

    torch.manual_seed(0)
    config = transformers.LlamaConfig(eos_token_id=None, pad_token_id=0, **sizes)
    with torch.device(device):
        dense = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    packed = copy.deepcopy(dense)
    sites, groups = {}, []
    for i in range(config.num_hidden_layers):
        attention = [f"model.layers.{i}.self_attn.{n}_proj.weight" for n in "qkvo"]
        mlp = [f"model.layers.{i}.mlp.{n}_proj.weight" for n in ("gate", "up", "down")]
        groups += [attention[:3], mlp[:2]]
        for name in (*attention, *mlp):
            rows, columns = dense.get_parameter(name).shape
            sites[name] = PackedSite("packed24", rows, columns, None, False, rows * columns // 2)
    pack_modules(packed, sites, groups)
    for name, site in sites.items():
        layer = packed.get_submodule(name.removesuffix(".weight"))
        content = random_24(site.rows, site.columns, torch.bfloat16, device)
        layer.weight.data.copy_(content.values * 0.02)
        layer.weight_meta.copy_(content.codes)
        dense.get_parameter(name).data.copy_(unpack(layer.packed()))
    prepare_model(packed, tune=tune)
    return dense, packed


def decode(device: torch.device, tokens: int, rounds: int) -> dict[str, Any]:
    from sparsify.backends.packed.bench.speed import decode_speed

    with torch.inference_mode():
        dense, packed = llama(device)
        ids = torch.randint(1, 30000, (1, 16), device=device)
        speed, same = decode_speed(dense, packed, ids, tokens, rounds)
    sizes = dense.get_memory_footprint(), packed.get_memory_footprint()
    return {
        "dense": speed.dense,
        "packed": speed.packed,
        "ratio": speed.ratio,
        "low": speed.low,
        "high": speed.high,
        "same_tokens": same,
        "weights": sizes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("bench_cuda"))
    parser.add_argument("--only", default="checks,shapes,decode")
    parser.add_argument("--policy", choices=["decode", "both"], default="both")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    device = current_gpu()
    if device is None:
        parser.error(f"no CUDA device for this torch ({torch.__version__}); run it on a machine with an NVIDIA GPU")
    parts, result = options.only.split(","), {"gpu": torch.cuda.get_device_name(device), "torch": torch.__version__}
    lines = [f"{result['gpu']}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"]
    options.output.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        (options.output / "bench_cuda.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (options.output / "bench_cuda.md").write_text("\n".join(lines) + "\n", encoding="utf-8")

    with torch.inference_mode():
        if "checks" in parts:
            products, plans, around = check_kernels(device), check_policies(device), check_torch(device)
            result["checks"] = {"products": products, "plans": plans, "around": around}
            lines += [
                "",
                f"{products} products within {BAR} of float64; {', '.join(around)}",
                *map("- {}".format, plans),
            ]
            write()
        if "shapes" in parts:
            times = time_shapes(device, options.policy)
            result["times_us"] = {shape: timings.micro for shape, timings in times.items()}
            lines += [*tables(times), *bandwidth(times)]
            write()
    if "decode" in parts:
        found = result["decode"] = decode(device, options.tokens, options.rounds)
        dense, packed = found["weights"]
        lines += [
            "",
            f"decode, LLaMA-7B's shape, one sequence, static cache, compiled: {found['dense']:.1f} → "
            f"{found['packed']:.1f} tokens/s, {found['ratio']:.2f}× ({found['low']:.2f} … {found['high']:.2f}); "
            f"weights in memory {packed / dense:.3f}×",
        ]
        write()
    print("\n".join(lines))


if __name__ == "__main__":
    main()
