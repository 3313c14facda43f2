"""How long models are captured whose layers loop over the sequence: against depth, and against a trace of every step.

    python tools/bench_capture.py [--family NAME …] [--length 2048] [--layers 48]

Models of hidden size 2048 are captured from their config, without weights. Each measurement is a process of its own;
CPU seconds stand first, since others may use the machine.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

FAMILIES = ("qwen3_next", "mamba", "mamba2", "rwkv", "llama")
# A trace of every step has a node for each of them: as much as a minute allows.
STEPS = {"qwen3_next": (2, 2048), "mamba": (2, 256), "rwkv": (2, 256)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--family", nargs="*", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        family, layers, length, whole = args.one
        one(family, int(layers), int(length), whole=whole == "whole")
        return
    from bench_prune import processor

    print(f"{processor()}, {os.cpu_count()} cores")
    print("family, layers × tokens, how: nodes, CPU seconds (wall)")
    for family in args.family:
        few, many = (in_child(family, layers, args.length, "whole") for layers in (args.layers // 4, args.layers))
        print(f"{family}: {args.layers} against {args.layers // 4} layers: {many / few:.1f}× the time")
        if family in STEPS:
            whole, steps = (in_child(family, *STEPS[family], how) for how in ("whole", "step by step"))
            print(f"{family}: step by step against whole: {steps / whole:.1f}× the time")


def in_child(family: str, layers: int, length: int, how: str) -> float:
    command = [sys.executable, __file__, "--one", family, str(layers), str(length), how]
    nodes, cpu, wall = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-3:]
    print(f"{family}, {layers} × {length}, {how}: {nodes} nodes, {cpu} s ({wall} s)", flush=True)
    return float(cpu)


def one(family: str, layers: int, length: int, *, whole: bool) -> None:
    """Capture a model and print its nodes, CPU seconds and seconds."""
    from sparsify.data.batches import example_batch
    from sparsify.frontend.capture import capture
    from sparsify.frontend.matching import weights_of_module
    from sparsify.frontend.source import Source, build_skeleton
    from sparsify.frontend.tracing import recurrences

    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), family, layers)
        model = build_skeleton(Path(folder))
        source = Source(family, model, weights_of_module(model))
        batch = example_batch(source, 1, length)
        with patch.object(recurrences, "FUNCTIONS", recurrences.FUNCTIONS if whole else ()):
            cpu, wall = time.process_time(), time.perf_counter()
            program = capture(source, batch)
            print(len(program.nodes), f"{time.process_time() - cpu:.1f}", f"{time.perf_counter() - wall:.1f}")


def write_config(folder: Path, family: str, layers: int) -> None:
    import transformers as hf

    size = {"vocab_size": 32000, "hidden_size": 2048, "num_hidden_layers": layers}
    heads = {"intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 2}
    if family == "qwen3_next":
        experts = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 512}
        config = hf.Qwen3NextConfig(**size, **heads, **experts, head_dim=256)
    elif family == "mamba2":
        config = hf.Mamba2Config(**size, num_heads=64, head_dim=64)
    elif family == "mamba":
        config = hf.MambaConfig(**size)
    elif family == "rwkv":
        config = hf.RwkvConfig(**size, context_length=4096)
    else:
        config = hf.LlamaConfig(**size, **heads)
    name = {"qwen3_next": "Qwen3Next", "mamba2": "Mamba2", "mamba": "Mamba", "rwkv": "Rwkv", "llama": "Llama"}[family]
    config.architectures = [f"{name}ForCausalLM"]
    config.save_pretrained(folder)


if __name__ == "__main__":
    main()
