"""A function in several processes of one job, as torchrun would start them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.families import build, inputs
from torch import Tensor

TESTS = Path(__file__).resolve().parent.parent


def model_of(family: str) -> Any:
    """A model of a family; of ``shared`` two blocks have one weight."""
    model = build("llama" if family == "shared" else family)
    if family == "shared":
        model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    return model


def batches_of(family: str, passes: Sequence[str]) -> list[dict[str, Tensor]]:
    """Five batches; of passes with gradients small ones, for they take sequences for themselves, or a few."""
    rows = {"gblm": 2, "gradient": 2, "llm-pruner": 2, "refine": 8}
    few = min((rows.get(one.partition(":")[0], 128) for one in passes), default=128)
    return [inputs("llama" if family == "shared" else family, rows=few, seed=seed) for seed in range(5)]


def start(count: int, code: str, *words: object, **environment: str) -> list[subprocess.Popen[str]]:
    """``code``, with ``words`` in sys.argv, in ``count`` processes of one thread; it finds ``join`` and ``support``."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    text = f"import sys, torch\ntorch.set_num_threads(1)\nimport sparsify\nfrom sparsify import join\n{code}"
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    return [
        subprocess.Popen(
            [sys.executable, "-c", text, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path, **environment},
        )
        for rank in range(count)
    ]


def finish(processes: Sequence[subprocess.Popen[str]], seconds: float = 240) -> list[tuple[int, str, str]]:
    """The exit code, output and errors of each, once all have ended."""
    try:
        done = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
    return [(p.returncode, *said) for p, said in zip(processes, done, strict=True)]
