"""vLLM's own server on a packed folder, over HTTP on this machine."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.serving_vllm import PROMPTS, expected, served

pytest.importorskip("vllm", reason="vLLM is not installed: make vllm")


def test_the_server_gives_the_offline_tokens_to_many_at_once(folders: dict[str, Path], tmp_path: Path) -> None:
    with served(folders["mixed"], tmp_path / "log") as complete, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(complete, PROMPTS * 8)) == expected(folders["mixed"]) * 8
