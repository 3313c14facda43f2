"""Tokens of vLLM's engine on CPUs, dense against packed: processor time of a token by sequences at once, and memory.

    python tools/make_checkpoint.py DENSE --size 1k
    sparsify compile DENSE --pass magnitude:2:4 --to packed:choice=smallest -o PACKED
    .venv-vllm/bin/python tools/bench_vllm.py DENSE PACKED [--sequences 1 2 4 8 16 32 64] [--tokens 32] [--rounds 3]
    .venv-vllm/bin/python tools/bench_vllm.py DENSE PACKED --memory

In an environment of vLLM's (`make vllm`). Three engines in one process: the dense folder, the packed one, and the
packed one with `policy` both; they are asked in turns, and of each the least counts. Prompts are 7 tokens, whose
share is in the figures. With --memory each engine has a process of its own, one after the other, which says what is
resident when it has answered, and the most that ever was.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

KINDS = ("dense", "packed", "both")
PROMPT = 7


def engine(kind: str, folder: Path, dtype: str) -> Any:
    from vllm import LLM

    policy = {"additional_config": {"sparsify": {"policy": "both"}}} if kind == "both" else {}
    return LLM(
        model=str(folder),
        dtype=dtype,
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=64,
        skip_tokenizer_init=True,
        distributed_executor_backend="uni",
        gpu_memory_utilization=0.2,
        enable_prefix_caching=False,
        **policy,
    )


def generate(llm: Any, sequences: int, tokens: int) -> list[list[int]]:
    from vllm import SamplingParams

    asked = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": [(5 + 31 * n + 7 * m) % 250 for m in range(PROMPT)]} for n in range(sequences)]
    return [list(done.outputs[0].token_ids) for done in llm.generate(prompts, asked, use_tqdm=False)]


def speeds(folders: dict[str, Path], counts: list[int], tokens: int, rounds: int, dtype: str) -> None:
    engines = {kind: engine(kind, folder, dtype) for kind, folder in folders.items()}
    for llm in engines.values():
        generate(llm, 4, 4)
    print(f"milliseconds of processor time a token, {tokens} tokens each, {dtype}, least of {rounds}")
    for count in counts:
        spent: dict[str, list[float]] = {kind: [] for kind in engines}
        for _ in range(rounds):
            for kind, llm in engines.items():
                start = time.process_time()
                generate(llm, count, tokens)
                spent[kind].append(1000 * (time.process_time() - start) / count / tokens)
        best = {kind: min(times) for kind, times in spent.items()}
        ratios = ", ".join(f"{kind} {best['dense'] / best[kind]:.2f}x" for kind in KINDS[1:] if kind in best)
        print(
            f"{count:3} sequences: " + ", ".join(f"{k} {ms:.2f}" for k, ms in best.items()) + f"; {ratios}", flush=True
        )


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(f"{field}:"))


def weigh(kind: str, folder: Path, dtype: str) -> None:
    """In a process of its own."""
    llm = engine(kind, folder, dtype)
    generate(llm, 8, 16)
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    held = sum({t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}.values()) // (1 << 20)
    print("WEIGHED", json.dumps({"resident": resident("VmRSS"), "peak": resident("VmHWM"), "tensors": held}))


def memory(folders: dict[str, Path], dtype: str) -> None:
    for kind, folder in folders.items():
        words = [sys.executable, __file__, str(folder), str(folder), "--weigh", kind, "--dtype", dtype]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        told = next(line for line in done.stdout.splitlines() if line.startswith("WEIGHED"))
        found = json.loads(told.removeprefix("WEIGHED"))
        print(f"{kind}: {found['resident']} MiB resident, {found['peak']} at most; {found['tensors']} in its tensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path, help="a folder that is not packed")
    parser.add_argument("packed", type=Path, help="the same model packed")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="at once")
    parser.add_argument("--tokens", type=int, default=32, help="of each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--memory", action="store_true", help="what each keeps, instead of how fast it is")
    parser.add_argument("--weigh", choices=KINDS, help=argparse.SUPPRESS)
    words = parser.parse_args()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING"}
    folders = {"dense": words.dense, "packed": words.packed, "both": words.packed}
    if words.weigh:
        weigh(words.weigh, folders[words.weigh], words.dtype)
    elif words.memory:
        memory(folders, words.dtype)
    else:
        speeds(folders, words.sequences, words.tokens, words.rounds, words.dtype)


if __name__ == "__main__":
    main()
