"""Whole models, packed against dense: tokens a second, files, loading, memory. The figures C9 of docs/benchmarks.md.

    python tools/bench_packed.py [--threads 1,2] [--rounds 7] [--patterns 2:4,50%] [--dtypes bfloat16,float32]
        [--json FILE]

A seeded random Llama of hidden 2048, 4 layers, intermediate 5632, vocabulary 4096, pruned by magnitude; dense is the
same pruned model as an ordinary folder in stock transformers. Both run in one process, in turns; wall time.
Then the bundled model, which is small enough that the cost of a call matters.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

import sparsify
from sparsify.backends.bench.benchmark import Benchmark
from sparsify.backends.bench.measure import bench
from sparsify.host import processor

ROOT = Path(__file__).parent.parent


def llama(folder: Path, dtype: str) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=2048,
        num_hidden_layers=4,
        intermediate_size=5632,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=4096,
        max_position_embeddings=2048,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def row(label: str, result: Benchmark) -> str:
    assert result.decode is not None and result.prefill is not None and result.loading is not None
    decode, prefill, (dense, packed) = result.decode, result.prefill, result.loading
    return (
        f"| {label} | {decode.against:.1f} | {decode.out:.1f} | "
        f"{decode.ratio:.2f}× ({decode.low:.2f} … {decode.high:.2f}) | "
        f"{prefill.ratio:.2f}× | {result.file_bytes[1] / result.file_bytes[0]:.3f}× | "
        f"{packed.seconds / dense.seconds:.2f}× | {packed.first / dense.first:.2f}× | "
        f"{packed.added / dense.added:.2f}× |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--patterns", default="2:4,50%")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    print(f"{processor()}, torch {torch.__version__}, transformers {transformers.__version__}\n")
    print("| model | dense, tokens/s | packed | decode | prefill | files | loading | first token | memory |")
    print("|---" * 9 + "|")
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as root:
        models = [(f"Llama, {dtype}", llama(Path(root) / dtype, dtype)) for dtype in options.dtypes.split(",")]
        models.append(("pycode-6m, bfloat16", ROOT / "models" / "pycode-6m"))
        for name, dense in models:
            for pattern in options.patterns.split(","):
                work = Path(root) / f"{name}-{pattern}".replace("%", "").replace(":", "")
                sparsify.compile(dense, [f"magnitude:{pattern}"], output=work / "hf")
                sparsify.compile(work / "hf", output=work / "packed", to="packed")
                for threads in map(int, options.threads.split(",")):
                    torch.set_num_threads(threads)
                    result = bench(work / "packed", str(work / "hf"), prompt=128, tokens=32, rounds=options.rounds)
                    print(row(f"{name}, {pattern}, {threads} threads", result), flush=True)
                    results.append({"model": name, "pattern": pattern, **result.as_dict()})
    if options.json:
        options.json.write_text(json.dumps({"processor": processor(), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
