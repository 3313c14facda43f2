"""tools/bench_serving.py against a server that is told what to answer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason="openai is not installed (the extra serve)")

import bench_serving


def text_of(prompt: str, tokens: int) -> str:
    return f"{prompt!r} and {tokens} more"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, dict[str, Any]]]:
    """The address of a server, and what it is told: to lose, or to change, the answer to so many tokens."""
    told: dict[str, Any] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = text_of(asked["prompt"], asked["max_tokens"])
            if asked["max_tokens"] == told.get("lose"):
                self.send_error(500)
                return
            if asked["max_tokens"] == told.get("change"):
                text += "!"
            choice = {"index": 0, "text": text, "finish_reason": "length", "logprobs": None}
            body: dict[str, Any] = {
                "id": "a",
                "object": "text_completion",
                "created": 1,
                "model": "m",
                "choices": [choice],
            }
            sent = json.dumps(body)
            if asked["stream"]:
                sent = f"data: {sent}\n\ndata: [DONE]\n\n"
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream" if asked["stream"] else "application/json")
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent.encode())

        def log_message(self, *words: Any) -> None:
            """Nobody reads it."""

    def offline(folder: Path, asked: list[tuple[str, int]]) -> tuple[list[tuple[str, int]], float, float, str]:
        return [(text_of(*question), question[1]) for question in asked], 1.0, 1.0, told.get("dtype", "float32")

    monkeypatch.setattr(bench_serving, "offline", offline)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running, ThreadPoolExecutor(1) as pool:
        pool.submit(running.serve_forever, 0.01)
        yield f"http://127.0.0.1:{running.server_port}/v1", told
        running.shutdown()


@pytest.mark.parametrize(
    ("given", "code", "lost", "differ"),
    [
        ({}, 0, 0, 0),
        ({"lose": 9}, 1, 2, 0),
        ({"change": 9}, 1, 0, 2),
        ({"change": 9, "dtype": "bfloat16"}, 0, 0, 2),
    ],
)
def test_a_load(
    given: dict[str, Any],
    code: int,
    lost: int,
    differ: int,
    server: tuple[str, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address, told = server
    told |= given
    words = ["OUT", "--requests", "18", "--at-once", "4", "--tokens", "16", "--address", address, "--name", "m"]
    monkeypatch.setattr(sys, "argv", ["bench_serving.py", *words, "--json", str(tmp_path / "found.json")])
    assert bench_serving.main() == code
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["requests"], found["lost"], found["differ"], found["cpu"]) == (18, lost, differ, None)


def test_the_processor_time_of_children_counts() -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass\nprint(1, flush=True)\nimport sys; sys.stdin.read()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-S", "-c", code], **pipes) as process:  # type: ignore[call-overload]
        process.stdout.readline()
        spent = bench_serving.processor_seconds(process.pid)
        process.stdin.close()
    assert spent is not None and spent >= 0.25
    assert bench_serving.processor_seconds(None) is None


def test_a_server_that_ends_is_not_waited_for(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o700)
    server = bench_serving.served_by_vllm(tmp_path, python, "float32", 1, [])
    with pytest.raises(SystemExit, match="the server ended with 3"), server:
        raise AssertionError("nothing is served")
