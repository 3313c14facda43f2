"""Packed 2:4 models against llama.cpp, and onnxruntime-genai where installed: one model in every form, in turns.

    OMP_NUM_THREADS=1 python tools/bench_peers.py [--threads 1] [--rounds 9] [--prompt 128] [--tokens 32] [--genai]
        [--compile]

A seeded random Llama of 222 million parameters (hidden 2048, 4 layers, intermediate 5632, 16 heads, 8 of keys and
values, vocabulary 8192), pruned 2:4 by magnitude: as bfloat16, and with every matrix, the head too, rounded to 8 and to
4 bits (scales for 64 columns). llama.cpp holds the dense model, as its own quantizer makes it by default. Wants `pip
install llama-cpp-python gguf`. Every round runs each form once; seconds of processor time, which other programs on the
machine change little, and medians of the rounds. A decoded token is what generation of a text takes for one: of ours
with the loop of transformers, of llama.cpp with a loop around `llama_decode`. `--compile` has ours once more with a
static cache whose steps torch compiles.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
import transformers
from bench_onnx import lend_tokenizer
from make_checkpoint import make_checkpoint

import sparsify
from sparsify.backends.bench.contender import InTorch, Reader
from sparsify.backends.bench.opening import open_contender
from sparsify.backends.bench.peers.genai import genai_peers, genai_version
from sparsify.backends.bench.peers.llama import llama_peers, llama_version
from sparsify.host import processor

# Ours, and which form of a peer's has as many bits.
RIVALS = {
    "2:4 bfloat16": ("llama.cpp BF16",),
    "2:4 int8": ("llama.cpp Q8_0", "genai int8"),
    "2:4 int4": ("llama.cpp Q4_0", "genai int4"),
}
COMPILED = ", compiled"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--genai", action="store_true", help="onnxruntime-genai too: its builder takes minutes")
    parser.add_argument("--compile", action="store_true", help="ours with compiled steps too: half a minute more")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    print(
        f"{processor()}, {os.cpu_count()} cores, {args.threads} threads; torch {torch.__version__}, {llama_version()}"
    )
    print(f"llama.cpp: {system_info()}", flush=True)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        readers, sizes = contenders(Path(scratch), stack, genai=args.genai, compiled=args.compile)
        ids = torch.arange(5, 5 + args.prompt)[None]
        with torch.inference_mode():
            prefill = in_turns(readers, lambda reader: spent(lambda: reader.read_prompt(ids)), args.rounds)
            decode = in_turns(readers, lambda reader: reader.generate(ids[:, :8], args.tokens + 1).cpu, args.rounds)
    print(f"load {os.getloadavg()[0]:.1f}\n")
    show(decode, prefill, sizes, args.tokens, args.prompt)


def contenders(
    scratch: Path, stack: ExitStack, *, genai: bool, compiled: bool
) -> tuple[dict[str, Reader], dict[str, int]]:
    """Every form of the model, open, and the bytes of its file."""
    dense = scratch / "dense"
    make_checkpoint(dense, "222m")
    lend_tokenizer(dense)
    readers: dict[str, Reader] = {}
    sizes: dict[str, int] = {}
    model = open_contender(dense)
    assert isinstance(model, InTorch)
    readers["dense bfloat16, torch"], sizes["dense bfloat16, torch"] = model, weight_bytes(dense)
    sparsify.compile(dense, ["magnitude:2:4"], output=scratch / "pruned")
    for name in RIVALS:
        folder = packed(scratch, name.removeprefix("2:4 "))
        own = open_contender(folder)
        readers[name], sizes[name] = own, weight_bytes(folder)
        if compiled:
            assert isinstance(own, InTorch)
            readers[name + COMPILED] = InTorch(own.model, cache_implementation="static", compile_config=everywhere())
            sizes[name + COMPILED] = sizes[name]
    place = scratch / "gguf"
    place.mkdir()
    for peer in llama_peers(model.model, place):
        readers[peer.name], sizes[peer.name] = stack.enter_context(peer.open()), peer.nbytes
    if genai:
        print(genai_version())
        for peer in genai_peers(dense, scratch / "genai"):
            readers[peer.name], sizes[peer.name] = stack.enter_context(peer.open()), peer.nbytes
    return readers, sizes


def everywhere() -> transformers.CompileConfig:
    """Steps compiled on a CPU too, which transformers does on GPUs alone unless it is told."""
    config = transformers.CompileConfig(mode="default", fullgraph=True)
    config._compile_all_devices = True
    return config


def packed(scratch: Path, values: str) -> Path:
    """The pruned model packed, its values as they are or rounded."""
    source = scratch / "pruned"
    if values != "bfloat16":
        rounding = f"round:{values},group=64,compensation=none"
        sparsify.compile(source, [rounding], output=scratch / f"{values}-body")
        source = scratch / f"{values}-whole"
        sparsify.compile(scratch / f"{values}-body", [rounding], only=["lm_head"], output=source)
    sparsify.compile(source, to="packed", output=scratch / f"{values}-packed")
    return scratch / f"{values}-packed"


def in_turns(readers: dict[str, Reader], call: Callable[[Reader], float], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round but the first."""
    found: dict[str, list[float]] = {name: [] for name in readers}
    for number in range(rounds + 1):
        for name, reader in readers.items():
            seconds = call(reader)
            if number:
                found[name].append(seconds)
    return found


def spent(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def show(
    decode: dict[str, list[float]], prefill: dict[str, list[float]], sizes: dict[str, int], tokens: int, prompt: int
) -> None:
    print("| | file, MB | decode, tokens a CPU second | prefill |")
    print("|---|---|---|---|")
    for name, nbytes in sizes.items():
        rates = [count / statistics.median(times[name]) for count, times in ((tokens, decode), (prompt, prefill))]
        print(f"| {name} | {nbytes / 1e6:.0f} | {rates[0]:.1f} | {rates[1]:.0f} |")
    print("\n| | decode (least and most of the rounds) | prefill |")
    print("|---|---|---|")
    for own, rivals in RIVALS.items():
        for name in (own, own + COMPILED):
            for rival in (*rivals, "dense bfloat16, torch") if name in sizes else ():
                if rival in sizes:
                    print(f"| {name} to {rival} | {gain(decode, name, rival)} | {gain(prefill, name, rival)} |")


def gain(times: dict[str, list[float]], name: str, rival: str) -> str:
    ratios = [other / own for own, other in zip(times[name], times[rival], strict=True)]
    return f"{statistics.median(ratios):.2f}× ({min(ratios):.2f} … {max(ratios):.2f})"


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def system_info() -> str:
    """What of the processor llama.cpp was compiled to use."""
    import llama_cpp

    return ctypes.string_at(llama_cpp.llama_print_system_info()).decode()


if __name__ == "__main__":
    main()
