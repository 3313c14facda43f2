"""vLLM's own server on a packed folder, over HTTP on this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.serving_vllm import PROMPTS, expected

pytest.importorskip("vllm", reason="vLLM is not installed: make vllm")


def ask(port: int, path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read() or b"null")


def test_the_server_gives_the_offline_tokens_to_many_at_once(folders: dict[str, Path], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    options += ["--dtype", "float32", "--max-model-len", "64", "--skip-tokenizer-init", "--return-tokens-as-token-ids"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folders["mixed"]), *options]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ)
        try:
            _wait(port, server, tmp_path / "log")
            asked = PROMPTS * 8

            def complete(prompt: list[int]) -> list[int]:
                body = {"model": "m", "prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
                answer = ask(port, "/v1/completions", body | {"return_token_ids": True, "detokenize": False})
                found: list[int] = answer["choices"][0]["token_ids"]
                return found

            with ThreadPoolExecutor(8) as pool:
                got = list(pool.map(complete, asked))
            assert got == expected(folders["mixed"]) * 8
        finally:
            server.terminate()
            server.wait(timeout=60)


def _wait(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 300
    while time.monotonic() < until:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            ask(port, "/health")
            return
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])
