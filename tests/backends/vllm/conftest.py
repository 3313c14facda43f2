"""Packed folders, and one vLLM engine after the other in this process."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.serving_vllm import FOLDERS, generated, model, packed

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # One thread, wherever the machine lets it run.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each of FOLDERS, with what transformers generates of it beside it: before vLLM changes transformers."""
    made = {}
    for name, (family, pruned, options) in FOLDERS.items():
        made[name] = packed(model(family, pruned), tmp_path_factory.mktemp(name.replace(" ", "_")), **options)
        (made[name] / "tokens.json").write_text(json.dumps(generated(made[name])))
    return made


@pytest.fixture
def engine() -> Iterator[Callable[..., Any]]:
    """Starts vLLM's engine on a folder, one at a time."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    def start(folder: Path, **options: Any) -> Any:
        given = {"enforce_eager": True, "dtype": "float32", "max_model_len": 64, "skip_tokenizer_init": True}
        given |= {"gpu_memory_utilization": 0.3}
        return LLM(model=str(folder), distributed_executor_backend="uni", **(given | options))

    yield start
    cleanup_dist_env_and_memory()
