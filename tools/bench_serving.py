"""A server under load: requests at once, none lost, every text the one that the folder gives offline; tokens a second.

    python tools/bench_serving.py OUT [--requests 200] [--at-once 16] [--tokens 32] [--threads 1] [--json FILE]
    python tools/bench_serving.py OUT --server vllm [--python .venv-vllm/bin/python] [-- --enforce-eager ...]
    python tools/bench_serving.py OUT --address http://127.0.0.1:8000/v1 --name MODEL      # a server that runs already

Starts `sparsify serve`, or vLLM's own server with the Python of its environment and the words behind `--`, on a port
that is free, unless --address names a server (of any OpenAI-compatible kind). Half of
the requests are streamed. Prompts are lines of Python of different lengths, answers of different lengths up to
--tokens, the likeliest token each time. Offline the same folder is loaded as sparsify serve loads it and generates one
text after the other, which is timed too. In float32 any difference is a fault: the exit code is 1. In bfloat16 two
tokens are often as likely: what differs there is counted and no fault.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import openai
import torch

from sparsify.backends.serve.opening import open_held
from sparsify.host import processor

LINES = (
    "import os\n",
    "def main(",
    "class Point:\n    ",
    "for name in sorted(names):\n",
    "    return self.",
    "if x is not ",
)


@dataclass(frozen=True)
class Load:
    """What the server did with the load.

    Attributes:
        server: which it is. cpu, cpu_offline: milliseconds of processor time that a token takes, in the server's
            processes and without one, whatever else the machine does. None where the server is not started here.
        lost: requests without an answer. differ: answers that are not the offline text.
        tokens: of all answers. seconds: from the first request to the last answer. median, slowest: of one request.
        offline: tokens a second of one text after the other, without a server.
    """

    server: str
    requests: int
    at_once: int
    lost: int
    differ: int
    tokens: int
    seconds: float
    median: float
    slowest: float
    offline: float
    cpu: float | None
    cpu_offline: float
    dtype: str
    threads: int
    processor: str


@contextlib.contextmanager
def served(folder: Path, threads: int) -> Iterator[tuple[str, str, int | None]]:
    """Address, name and process of `sparsify serve`."""
    words = [sys.executable, "-m", "sparsify", "serve", str(folder), "--port", "0", "--json", "--device", "cpu"]
    process = subprocess.Popen([*words, "--threads", str(threads)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        yield told["address"], told["model"], told["process"]
    finally:
        process.terminate()
        process.wait(60)


@contextlib.contextmanager
def served_by_vllm(
    folder: Path, python: Path, dtype: str, threads: int, more: list[str]
) -> Iterator[tuple[str, str, int | None]]:
    """Address, name and process of vLLM's server, which says what it does on this process's stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--dtype", dtype]
    words += ["--served-model-name", folder.name, "--host", "127.0.0.1", "--port", str(port), *more]
    own = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(words, stdout=sys.stderr, env=own | os.environ)
    try:
        wait(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}/v1", folder.name, process.pid
    finally:
        process.terminate()
        process.wait(60)


def wait(address: str, process: subprocess.Popen[bytes], seconds: float = 600) -> None:
    """Until ``address`` answers.

    Raises:
        SystemExit: the server ended, or says nothing for so long.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if process.poll() is not None:
            raise SystemExit(f"the server ended with {process.returncode}")
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=10):
            return
        time.sleep(0.5)
    raise SystemExit(f"{address} says nothing")


def processor_seconds(process: int | None) -> float | None:
    """What ``process`` and those that it started have taken so far; None where nobody says."""
    if process is None or not Path(f"/proc/{process}/stat").exists():
        return None
    parents, ticks = dict[int, int](), dict[int, int]()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # one that has ended meanwhile
            fields = stat.read_text(encoding="utf-8").rpartition(") ")[2].split()
            parents[int(stat.parent.name)], ticks[int(stat.parent.name)] = int(fields[1]), sum(map(int, fields[11:13]))
    every = [process]
    for one in every:
        every += [child for child, parent in parents.items() if parent == one]
    return sum(ticks.get(one, 0) for one in every) / os.sysconf("SC_CLK_TCK")


def questions(count: int, tokens: int) -> list[tuple[str, int]]:
    """Prompts, and how many tokens each asks for."""
    return [(LINES[n % len(LINES)] * (1 + n % 7), tokens // 2 + n % (tokens // 2 + 1)) for n in range(count)]


def ask(client: openai.OpenAI, name: str, prompt: str, tokens: int, stream: bool) -> tuple[str | None, float]:
    """The text (None: there was no answer), and the seconds until all of it was there."""
    start = time.perf_counter()
    options: Any = {"model": name, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": stream}
    try:
        made: Any = client.completions.create(**options)
        text = "".join(part.choices[0].text for part in made) if stream else made.choices[0].text
    except openai.OpenAIError as error:
        print(f"lost: {error}", file=sys.stderr)
        return None, 0.0
    return text, time.perf_counter() - start


def offline(folder: Path, asked: list[tuple[str, int]]) -> tuple[list[tuple[str, int]], float, float, str]:
    """Text and number of tokens of every question, seconds of a clock and of the processor, and the dtype."""
    held = open_held(folder, "offline", torch.device("cpu"))
    made, start, before = [], time.perf_counter(), time.process_time()
    for prompt, tokens in asked:
        given = held.tokenizer(prompt, return_tensors="pt")
        out = held.model.generate(
            given.input_ids, attention_mask=given.attention_mask, max_new_tokens=tokens, do_sample=False
        )[0, given.input_ids.shape[1] :]
        made.append((held.tokenizer.decode(out, skip_special_tokens=True), len(out)))
    seconds, processor_time = time.perf_counter() - start, time.process_time() - before
    held.worker.shutdown()
    return made, seconds, processor_time, str(held.model.dtype).removeprefix("torch.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what is served")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32, help="of the longest answers")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    parser.add_argument("--server", choices=["sparsify", "vllm"], default="sparsify", help="which is started")
    parser.add_argument("--python", type=Path, default=Path(".venv-vllm/bin/python"), help="of vLLM's environment")
    parser.add_argument("--address", help="a server that runs already, as .../v1")
    parser.add_argument("--name", help="what it calls the model")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    # Behind -- are words for vLLM's server, which begin with dashes too.
    argv = sys.argv[1:]
    end = argv.index("--") if "--" in argv else len(argv)
    words, behind = parser.parse_args(argv[:end]), argv[end + 1 :]
    torch.set_num_threads(words.threads)
    asked = questions(words.requests, words.tokens)
    expected, alone, alone_cpu, dtype = offline(words.folder, asked)
    every = sum(count for _, count in expected)
    where: Any = served(words.folder, words.threads)
    if words.address:
        where = contextlib.nullcontext((words.address, words.name, None))
    elif words.server == "vllm":
        where = served_by_vllm(words.folder, words.python, dtype, words.threads, behind)
    with where as (address, name, process), ThreadPoolExecutor(words.at_once) as pool:
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=600)
        start, before = time.perf_counter(), processor_seconds(process)
        given = list(pool.map(lambda n: ask(client, name, *asked[n], n % 2 == 0), range(len(asked))))
        seconds, after = time.perf_counter() - start, processor_seconds(process)
    took = [one for text, one in given if text is not None]
    answered = [(text, right) for (text, _), (right, _) in zip(given, expected, strict=True) if text is not None]
    load = Load(
        server=words.address or words.server,
        requests=len(asked),
        at_once=words.at_once,
        lost=len(asked) - len(answered),
        differ=sum(text != right for text, right in answered),
        tokens=sum(count for (text, _), (_, count) in zip(given, expected, strict=True) if text is not None),
        seconds=round(seconds, 2),
        median=round(statistics.median(took), 3) if took else 0.0,
        slowest=round(max(took, default=0.0), 3),
        offline=round(every / alone, 1),
        cpu=None if before is None or after is None else round(1000 * (after - before) / every, 2),
        cpu_offline=round(1000 * alone_cpu / every, 2),
        dtype=dtype,
        threads=words.threads,
        processor=processor(),
    )
    print(f"{load.requests} requests, {load.at_once} at once: {load.lost} lost, {load.differ} other texts than offline")
    print(f"{load.tokens / seconds:.0f} tokens/s ({load.tokens} in {load.seconds} s); offline {load.offline:.0f}")
    print(f"a request: median {load.median} s, slowest {load.slowest} s; {dtype}, {load.threads} thread(s)")
    print(f"processor time a token: {load.cpu} ms in the server, {load.cpu_offline} ms offline")
    if words.json is not None:
        words.json.write_text(json.dumps(asdict(load), indent=2) + "\n", encoding="utf-8")
    return int(load.lost > 0 or (load.differ > 0 and dtype == "float32"))


if __name__ == "__main__":
    raise SystemExit(main())
