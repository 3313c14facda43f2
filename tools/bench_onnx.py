"""ONNX export: time against depth, memory of a large checkpoint, packed files, decoding against onnxruntime-genai, and
our operators against dense products.

    python tools/bench_onnx.py [layers] [memory] [packed] [decode] [zeros] [sparse] [integers]    # all, or those

Every figure is a ratio within one run, or bytes. Models are random, made by tools/make_checkpoint.py; the packed and
decode parts prune them 2:4 by magnitude. Measurements of memory and of load times are processes of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from make_checkpoint import make_checkpoint

import sparsify
from sparsify.host import processor

STAGES = """
import json, sys, time
from pathlib import Path
import torch
from sparsify.backends.onnx import graph as g
from sparsify.backends.onnx.tracing.trace import trace_model
from sparsify.frontend.source import open_source
source, times, last = open_source(sys.argv[1]), {}, time.process_time()
def lap(name):
    global last
    times[name], last = time.process_time() - last, time.process_time()
if sys.argv[2] == "whole":
    g.decompose_apart = lambda exported: None
exported, contract = trace_model(source.module, {}, torch.float32)
lap("trace")
whole = g._optimise
def optimise(model):
    lap("translate")
    whole(model)
    lap("optimise")
g._optimise = optimise
model, _ = g.to_graph(exported, contract.input_names, contract.output_names, opset=23, linear="gemm")
print(json.dumps(times | {"nodes": len(model.graph)}))
"""

MEMORY = """
import sys
import torch, transformers, torch.onnx, onnx, onnxruntime
import sparsify.backends.onnx.api
def status(key):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(key))
before = status("VmRSS")
import sparsify
sparsify.compile(sys.argv[1], to="onnx", output=sys.argv[2])
# Not ru_maxrss, which a process inherits from the one that started it.
print(before, status("VmHWM"))
"""

LOAD = """
import json, sys, time
from pathlib import Path
from sparsify.backends.onnx.running.session import open_session
import onnxruntime
def status(key):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(key))
before = status("VmRSS")
began = time.perf_counter()
session = open_session(Path(sys.argv[1]) / "model.onnx")
took = time.perf_counter() - began
print(json.dumps({"seconds": took, "peak": status("VmHWM") - before}))
"""

# A weight that lies in a mapped file counts when it was read; other programs on the machine do not lengthen CPU time.
LOAD_AND_RUN = LOAD.replace("perf_counter", "process_time").replace(
    "print(",
    "from sparsify.backends.onnx.running.runner import Runner\n"
    "import numpy as np\n"
    "one = Runner(Path(sys.argv[1]), session=session, check=False)\n"
    "one.forward(np.ones((1, 1), np.int64), np.ones((1, 1), np.int64), one.empty(1))\n"
    "print(",
)


OPEN_GENAI = """
import json, sys, time
import onnxruntime_genai as og
def status(key):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(key))
before, began = status("VmRSS"), time.process_time()
model = og.Model(sys.argv[1])
params = og.GeneratorParams(model)
params.set_search_options(max_length=4, do_sample=False)
generator = og.Generator(model, params)
generator.append_tokens([5, 6, 7])
generator.generate_next_token()
print(json.dumps({"seconds": time.process_time() - began, "peak": status("VmHWM") - before}))
"""


def main() -> None:
    parts: dict[str, Callable[..., None]] = {
        "layers": layers,
        "memory": memory,
        "packed": packed,
        "decode": decode,
        "zeros": zeros,
        "sparse": sparse,
        "integers": integers,
    }
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", choices=[*parts, []], default=[])
    parser.add_argument("--threads", type=int, default=1, help="of `sparse` and `integers` [default: 1]")
    args = parser.parse_args()
    print(f"{processor()}, {os.cpu_count()} cores")
    for name in args.parts or parts:
        with tempfile.TemporaryDirectory() as scratch:
            more = {"threads": args.threads} if name in ("sparse", "integers") else {}
            parts[name](Path(scratch), **more)


def child(code: str, *words: object) -> str:
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout.strip().splitlines()[-1]


def layers(scratch: Path) -> None:
    """CPU seconds of each stage at 8, 16 and 32 layers, and of translating the whole as torch decomposes it."""
    times: dict[int, dict[str, float]] = {}
    for depth in (8, 16, 32):
        make_checkpoint(scratch / str(depth), "tiny", layers=depth)
        times[depth] = json.loads(child(STAGES, scratch / str(depth), "apart"))
        total = sum(v for k, v in times[depth].items() if k != "nodes")
        stages = ", ".join(f"{k} {v:.1f}" for k, v in times[depth].items() if k != "nodes")
        print(f"{depth} layers: {total:.1f} s ({stages}), {times[depth]['nodes']:.0f} nodes")
    for stage in ("trace", "translate", "optimise"):
        print(f"16 to 32 layers, {stage}: {times[32][stage] / times[16][stage]:.2f}×")
    whole = json.loads(child(STAGES, scratch / "16", "whole"))
    print(f"16 layers, translated as a whole: {whole['translate']:.1f} s, {whole['nodes']:.0f} nodes")


def memory(scratch: Path) -> None:
    """How far a link export of a checkpoint over 2 GiB raises the resident memory over that of the imports."""
    total = make_checkpoint(scratch / "large", "13b", layers=4, shard=1_000_000_000)
    before, peak = map(float, child(MEMORY, scratch / "large", scratch / "out").split())
    graph = (scratch / "out" / "model.onnx").stat().st_size
    extra = sum(p.stat().st_size for p in (scratch / "out").iterdir()) - sum(
        p.stat().st_size for p in (scratch / "large").iterdir()
    )
    print(
        f"link, {total / (1 << 30):.2f} GiB checkpoint: {peak - before:.0f} MiB over the imports' {before:.0f}; "
        f"model.onnx {graph / 1024:.0f} KiB, the folder {extra / 1024:.0f} KiB larger than the checkpoint"
    )


def packed(scratch: Path) -> None:
    """File size, time to open and peak memory of packed against dense files of the same weights."""
    make_checkpoint(scratch / "model", "1k", layers=8)
    for dtype in ("float32", "float16"):
        for spec in ("magnitude:2:4", "magnitude:50%", "magnitude:75%"):
            sizes, loads = {}, {}
            for mode in ("external", "packed"):
                out = scratch / f"{spec.replace(':', '-')}-{dtype}-{mode}"
                to = f"onnx:weights={mode},dtype={dtype}"
                result = sparsify.compile(scratch / "model", [spec], to=to, output=out)
                sizes[mode] = (out / "model.onnx.data").stat().st_size
                loads[mode] = min((json.loads(child(LOAD, out)) for _ in range(3)), key=lambda r: r["seconds"])
            pruned = sum(np.prod(s.shape) for s in result.runs[0].sites) * (4 if dtype == "float32" else 2)
            rest = sizes["external"] - pruned
            kept = result.runs[0].kept
            theory = kept + 1 / (32 if dtype == "float32" else 16)
            ratio = (sizes["packed"] - rest) / pruned
            print(
                f"{spec} {dtype}: pruned weights {ratio:.4f} of dense (theory {theory:.4f}), open "
                f"{loads['packed']['seconds'] / loads['external']['seconds']:.1f}×, peak memory "
                f"{loads['packed']['peak'] / loads['external']['peak']:.1f}×"
            )


def decode(scratch: Path) -> None:
    """Tokens a second: sparsify's runner, genai on the same folder, genai on the file of its own builder."""
    make_checkpoint(scratch / "model", "1k", layers=6)
    lend_tokenizer(scratch / "model")
    sparsify.compile(scratch / "model", ["magnitude:2:4"], output=scratch / "pruned")
    sparsify.compile(scratch / "pruned", to="onnx", output=scratch / "ours")
    _built_by_genai(scratch / "pruned", "fp32", scratch / "theirs")
    from sparsify.backends.onnx.running.runner import Runner

    runner = Runner(scratch / "ours")
    prompt = np.arange(5, 21)[None]

    def ours(count: int) -> float:
        times = []
        last = time.perf_counter()
        for _ in runner.generate(prompt, tokens=count):
            now = time.perf_counter()
            times.append(now - last)
            last = now
        return 1 / statistics.median(times[1:])

    jobs = {
        "sparsify run": ours,
        "genai, our folder": _by_genai(scratch / "ours", prompt, time.perf_counter),
        "genai, its own": _by_genai(scratch / "theirs", prompt, time.perf_counter),
    }
    rates: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(5):
        for name, job in jobs.items():
            rates[name].append(job(64))
    base = max(rates["genai, its own"])
    for name, values in rates.items():
        print(f"decode, {name}: {max(values):.1f} tokens/s, {max(values) / base:.2f}× genai's own export")


def _built_by_genai(model: Path, precision: str, out: Path) -> None:
    """The graph that onnxruntime-genai's own builder makes of a folder."""
    builder = [sys.executable, "-W", "ignore", "-m", "onnxruntime_genai.models.builder"]
    words = ["-i", str(model), "-o", str(out), "-p", precision, "-e", "cpu", "-c", str(out.parent / "cache")]
    done = subprocess.run([*builder, *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)


def _by_genai(folder: Path, prompt: Any, clock: Callable[[], float]) -> Callable[[int], float]:
    """Tokens a second of a folder in onnxruntime-genai, by ``clock``: the median over a text."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))

    def run(count: int) -> float:
        params = og.GeneratorParams(model)
        length = prompt.shape[1] + count
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(prompt.astype(np.int32))
        times = []
        for _ in range(count):
            began = clock()
            generator.generate_next_token()
            times.append(clock() - began)
        return 1 / statistics.median(times[1:])

    return run


def lend_tokenizer(folder: Path) -> None:
    """The bundled model's tokenizer for a random model, without which genai's builder and its reader do nothing."""
    bundled = Path(__file__).parents[1] / "models" / "pycode-6m"
    for path in bundled.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config |= {"eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))


def zeros(scratch: Path) -> None:
    """Time of one token with dense and with 2:4 weights: what stock onnxruntime gains from zeros."""
    from sparsify.backends.onnx.running.runner import Runner

    make_checkpoint(scratch / "model", "1k", layers=4)
    sparsify.compile(scratch / "model", to="onnx", output=scratch / "dense")
    sparsify.compile(scratch / "model", ["magnitude:2:4"], to="onnx", output=scratch / "sparse")
    # One thread each: the idle session would spin on the other core.
    runners = {name: Runner(scratch / name, threads=1) for name in ("dense", "sparse")}
    ids = np.ones((1, 1), np.int64)
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(100):
        for name, runner in runners.items():
            began = time.perf_counter()
            runner.forward(ids, ids, runner.empty(1))
            times[name].append(time.perf_counter() - began)
    ratio = min(times["sparse"]) / min(times["dense"])
    print(f"zeros: a token with 2:4 weights takes {ratio:.2f}× one with dense weights")


def sparse(scratch: Path, threads: int) -> None:
    """Our operators against dense products in the same runtime: 222 million parameters, in turns."""
    make_checkpoint(scratch / "model", "1k", layers=16)
    for spec in ("magnitude:2:4", "magnitude:50%"):
        pruned = scratch / spec.replace(":", "-")
        sparsify.compile(scratch / "model", [spec], output=pruned)
        for dtype in ("float32", "bfloat16"):
            _compare_sparse(spec, pruned, dtype, scratch / "dense", scratch / "sparse", threads)


def integers(scratch: Path, threads: int) -> None:
    """2:4 with values of 8 and 4 bits against what genai's builder makes of the same model with as many bits: both in
    genai, in turns; all matrices rounded, the head too.
    """
    make_checkpoint(scratch / "model", "1k", layers=16)
    lend_tokenizer(scratch / "model")
    sparsify.compile(scratch / "model", ["magnitude:2:4"], output=scratch / "pruned")
    for bits in (8, 4):
        rounding = f"round:int{bits},group=64,compensation=none"
        sparsify.compile(scratch / "pruned", [rounding], output=scratch / "body", overwrite=True)
        sparsify.compile(scratch / "body", [rounding], only=["lm_head"], output=scratch / "whole", overwrite=True)
        sparsify.compile(scratch / "whole", to="onnx:weights=sparse", output=scratch / "ours", overwrite=True)
        _built_by_genai(scratch / "model", f"int{bits}", scratch / f"theirs{bits}")
        folders = {"ours": scratch / "ours", "theirs": scratch / f"theirs{bits}"}
        size = {name: sum(p.stat().st_size for p in folder.glob("*.data")) for name, folder in folders.items()}
        opened = {name: [json.loads(child(OPEN_GENAI, folder)) for _ in range(2)] for name, folder in folders.items()}
        least = {name: {key: min(run[key] for run in runs) for key in runs[0]} for name, runs in opened.items()}
        for folder in folders.values():
            config = json.loads((folder / "genai_config.json").read_text())
            config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
            (folder / "genai_config.json").write_text(json.dumps(config))
        prompt = np.arange(5, 21)[None]
        runs = {name: _by_genai(folder, prompt, _clock(threads)) for name, folder in folders.items()}
        ratios = [runs["ours"](24) / runs["theirs"](24) for _ in range(9)]
        kinds = {name: least["ours"][name] / least["theirs"][name] for name in ("seconds", "peak")}
        print(
            f"int{bits}: a token {statistics.median(ratios):.2f}× as fast as genai's own int{bits} "
            f"({min(ratios):.2f} to {max(ratios):.2f}); file {size['ours'] / size['theirs']:.3f} of its; CPU time to "
            f"open {kinds['seconds']:.2f}×, peak memory {kinds['peak']:.2f}×; load {os.getloadavg()[0]:.1f}",
            flush=True,
        )


def _clock(threads: int) -> Callable[[], float]:
    """Seconds of this thread, which other programs on the machine do not lengthen, where it does all the work."""
    return time.thread_time if threads == 1 else time.perf_counter


def _compare_sparse(spec: str, pruned: Path, dtype: str, dense: Path, sparse: Path, threads: int) -> None:
    from sparsify.backends.onnx.running.runner import Runner

    folders = {"external": dense, "sparse": sparse}
    for mode, folder in folders.items():
        sparsify.compile(pruned, to=f"onnx:weights={mode},dtype={dtype}", output=folder, overwrite=True)
    loads = {mode: [json.loads(child(LOAD_AND_RUN, folder)) for _ in range(2)] for mode, folder in folders.items()}
    runners = {mode: Runner(folder, threads=threads, check=False) for mode, folder in folders.items()}
    one, many = (_in_turns(runners, length, times, _clock(threads)) for length, times in ((1, 60), (128, 8)))
    size = {mode: (folder / "model.onnx.data").stat().st_size for mode, folder in folders.items()}
    least = {mode: {key: min(r[key] for r in runs) for key in runs[0]} for mode, runs in loads.items()}
    ratios = {key: least["sparse"][key] / least["external"][key] for key in ("seconds", "peak")}
    print(
        f"{spec} {dtype}: a token {one:.2f}× as fast as dense, 128 tokens {many:.2f}×; file "
        f"{size['sparse'] / size['external']:.3f}, CPU time to open {ratios['seconds']:.2f}×, peak memory after "
        f"a token {ratios['peak']:.2f}×; load {os.getloadavg()[0]:.1f}",
        flush=True,
    )


def _in_turns(runners: Mapping[str, Any], length: int, times: int, clock: Callable[[], float]) -> float:
    """How many times as fast ``sparse`` takes ``length`` tokens as ``external``: the median over pairs of turns."""
    ids = np.ones((1, length), np.int64)
    ratios = []
    for _ in range(times):
        took = {}
        for name in ("external", "sparse"):
            began = clock()
            runners[name].forward(ids, ids, runners[name].empty(1))
            took[name] = clock() - began
        ratios.append(took["external"] / took["sparse"])
    return statistics.median(ratios)


if __name__ == "__main__":
    main()
